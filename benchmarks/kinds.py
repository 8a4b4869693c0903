"""What a student comes to with each label kind: the whole line, the same tokens, three seeds.

Runs the demo's family with one student by ``stillhouse run``, once per kind and seed, in a Stillhouse home of its own.
The seed decides which documents are held out, the order of the batches, and so the draws. Takes about two minutes per
run on two CPU cores. ``python benchmarks/kinds.py``.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import yaml
from common import ROOT, arguments, hardware, write

KINDS: dict[str, dict[str, Any]] = {
    "topk": {"kind": "topk", "k": 64},
    "sampled": {"kind": "sampled", "draws": 50},
    "hidden": {"kind": "hidden"},
}
FIGURES = ("kl", "agreement", "calibration_error")


def spec_of(kind: str, seed: int, batches: int, student: str) -> dict[str, Any]:
    """The demo's family with one student, no endpoints, and labels of a kind."""
    spec: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "demo.yaml").read_text())
    spec["name"] = f"kinds-{kind}-{seed}"
    spec["teacher"]["model"] = str(ROOT / "examples" / spec["teacher"]["model"])
    corpus = spec["corpus"]
    corpus.update(paths=[str(ROOT / "examples" / path) for path in corpus["paths"]], seed=seed, max_batches=batches)
    spec["labels"] = KINDS[kind]
    spec["students"] = {student: spec["students"][student]}
    spec["evaluation"]["angle_every"] = None
    del spec["serving"]
    return spec


def run(spec: dict[str, Any], home: Path) -> dict[str, Any]:
    """Run a family; what its student's last commit says."""
    path = home / f"{spec['name']}.yaml"
    path.write_text(yaml.safe_dump(spec))
    command = [sys.executable, "-m", "jobs", "run", str(path)]
    env = {**os.environ, "STILLHOUSE_HOME": str(home), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{spec['name']} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    commits = [json.loads(file.read_text()) for file in (home / "runs" / spec["name"]).rglob("commit.json")]
    return next(commit for commit in commits if commit["after"])


def main() -> None:
    """Run all, print one table of means and standard deviations over the seeds."""
    parser = arguments(__doc__.splitlines()[0], threads=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=32, help="batches of 1,024 tokens")
    parser.add_argument("--student", default="large", help="which of the demo's students")
    given = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for seed, kind in itertools.product(given.seeds, KINDS):
        with tempfile.TemporaryDirectory() as folder:
            commit = run(spec_of(kind, seed, given.batches, given.student), Path(folder))
        runs.append({"kind": kind, "seed": seed, **commit["after"], "kl_before": commit["before"]["kl"]})
        figures = ", ".join(f"{name} {commit['after'][name]:.4f}" for name in FIGURES)
        print(f"{kind} seed {seed}: {figures}", flush=True)
    print(f"{given.batches} batches of 1,024 tokens, seeds {given.seeds}; mean (standard deviation); {hardware()}")
    for kind in KINDS:
        own = [each for each in runs if each["kind"] == kind]
        columns = ([each[name] for each in own] for name in FIGURES)
        shown = [f"{statistics.mean(c):.4f} ({statistics.stdev(c) if len(c) > 1 else 0:.4f})" for c in columns]
        print(f"{kind:10}" + "".join(f"  {name} {value}" for name, value in zip(FIGURES, shown, strict=True)))
    write(given.out, "kinds", {"batches": given.batches, "student": given.student, "runs": runs})


if __name__ == "__main__":
    main()
