"""One pass for three students against three families of one student each, and against a warm label store.

Runs the whole line on the demo teacher five times: (a) three students in one pass, (b) each of them alone, (c) all
three over the store that (a) has filled. Every process has one thread, so that a family keeps the machine's cores busy
by its parts and not by threads that fight each other.

Two ideals: from the arithmetic, 2 FLOPs per teacher parameter and token and 6 per student parameter; and from the stage
times that (b) shows, all of one pass's work divided by the cores. Where there are more processes than cores a stage
takes longer than alone, and no part stands still for it: so it is also said how much of the pass the slowest student
learns, the rest being what the line made it wait for. Takes about 12 minutes on two CPU cores.
``python benchmarks/family.py``.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import yaml
from common import CORPUS, ROOT, TEACHER, arguments, hardware, write
from safetensors import safe_open

from cluster.audit import AUDIT_FOLDER
from cluster.audit import TEACHER as SCORED
from cluster.family import run_family
from cluster.preflight import preflight
from cluster.runs import open_run
from cluster.session import ray_session
from cluster.specfile import load_spec

LAYERS = {"large": 24, "middle": 17, "small": 9}


def spec_of(name: str, students: list[str], batches: int, store: Path) -> dict[str, Any]:
    """A family over the demo teacher. Less than half a core is asked for, so that Ray places all parts at once."""
    student = {"micro_batch": 4, "lr": 1e-3, "cpus_per_rank": 0.3}
    return {
        "name": name,
        "teacher": {"model": str(TEACHER), "cpus_per_shard": 0.3},
        "corpus": {"paths": [str(CORPUS)], "sequence_length": 256, "batch_sequences": 4, "max_batches": batches},
        "labels": {"kind": "sampled", "draws": 50},
        "students": {each: {"init": {"source": "teacher", "layers": LAYERS[each]}, **student} for each in students},
        "evaluation": {"batches": 1, "angle_every": None},
        "store": {"uri": str(store)},
    }


@dataclass(frozen=True)
class Pass:
    """What one run took.

    Attributes:
        wall_s: from start to finish, with starting processes, measuring and registering.
        pass_s: from when the teacher begins its first batch, or a student where there is no teacher, to the last step
            of the last student. It takes in that the students are measured before they begin.
        teacher_s: seconds in which the teacher was busy, per batch.
        student_s: seconds that each student spent learning, per batch.
        parameters: of each student.
    """

    wall_s: float
    pass_s: float
    scored: int
    teacher_s: float
    student_s: dict[str, float]
    parameters: dict[str, int]


def measured(spec: dict[str, Any], folder: Path) -> Pass:
    """Run a family and read from its logs what it took."""
    path = folder / f"{spec['name']}.yaml"
    path.write_text(yaml.safe_dump(spec))
    checked = preflight(load_spec(path))
    result = run_family(checked, open_run(checked.spec, False), lambda status: None)
    if result.failed:
        raise SystemExit(f"{spec['name']}: {result.failed}")
    audit = result.run.folder / AUDIT_FOLDER
    events = {log.stem: [json.loads(line) for line in log.read_text().splitlines()] for log in audit.glob("*.jsonl")}
    steps = {name: [event["at"] for event in log if "batch" in event] for name, log in events.items()}
    scored = steps.pop(SCORED, [])
    batches = result.stats.total
    teacher_s = result.stats.pool.busy_seconds / max(1, len(scored))
    student_s = {name: student.seconds / batches for name, student in result.students.items()}
    # What is logged is the end of each.
    begun = scored[0] - teacher_s if scored else min(steps[name][0] - student_s[name] for name in steps)
    found = Pass(
        result.seconds,
        max(log[-1] for log in steps.values()) - begun,
        len(scored),
        teacher_s,
        student_s,
        {name: student.parameters for name, student in result.students.items()},
    )
    each = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found.student_s.items())
    print(
        f"{spec['name']}: {found.wall_s:.0f} s in all, {found.pass_s:.0f} s from the first batch to the last step; "
        f"per batch teacher {found.teacher_s:.2f} s, {each}",
        flush=True,
    )
    return found


def main() -> None:
    """Measure all, print the ratios."""
    parser = arguments(__doc__.splitlines()[0], threads=False)
    parser.add_argument("--batches", type=int, default=24, help="batches of 1,024 tokens")
    given = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)  # for the actors
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name, ray_session():
        folder = Path(name)
        os.environ["STILLHOUSE_HOME"] = str(folder / "home")
        shared = folder / "labels"
        one = measured(spec_of("one-pass", list(LAYERS), given.batches, shared), folder)
        alone = {
            each: measured(spec_of(f"alone-{each}", [each], given.batches, folder / each), folder) for each in LAYERS
        }
        warm = measured(spec_of("warm-store", list(LAYERS), given.batches, shared), folder)
    figures = ratios(one, alone, warm, given.batches, cores)
    for what, value in figures.items():
        print(f"{what}: {value:.3g}")
    print(f"{given.batches} batches of 1,024 tokens, {cores} cores, {hardware()}")
    runs = {"one_pass": vars(one), "warm_store": vars(warm), **{f"alone_{n}": vars(p) for n, p in alone.items()}}
    write(given.out, "family", {"batches": given.batches, "cores": cores, **figures, "runs": runs})


def parameters_of(model: Path) -> int:
    """Number of a model's weights, tied ones counted once."""
    counts = []
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            names = weights.keys()
            counts += [math.prod(weights.get_slice(name).get_shape()) for name in names]
    return sum(counts)


def ratios(one: Pass, alone: dict[str, Pass], warm: Pass, batches: int, cores: int) -> dict[str, float]:
    """Ideals, and how near the measured times come to them."""
    teacher = 2 * parameters_of(TEACHER)
    students = {name: 6 * count for name, count in one.parameters.items()}
    # Seconds of work on one core; what each part took while it had a core to itself.
    scoring = min(each.teacher_s for each in alone.values())
    learning = {name: each.student_s[name] for name, each in alone.items()}
    ideal = batches * max((scoring + sum(learning.values())) / cores, scoring, *learning.values())
    ideal_warm = batches * max(sum(learning.values()) / cores, *learning.values())
    apart = sum(each.pass_s for each in alone.values())
    # What N separate runs cost over what one pass costs, by FLOPs and by what each part took.
    arithmetic = sum(teacher + each for each in students.values()) / (teacher + sum(students.values()))
    learnt = sum(learning.values())
    stages = (len(learning) * scoring + learnt) / (scoring + learnt)
    ratio = apart / one.pass_s
    return {
        "(b) three families / (a) one pass, wall-clock": sum(each.wall_s for each in alone.values()) / one.wall_s,
        "(b) / (a), first batch to last step": ratio,
        "(b) / (a) by the arithmetic": arithmetic,
        "(b) / (a) by stage times": stages,
        "measured over the arithmetic's ideal": ratio / arithmetic,
        "measured over the stage times' ideal": ratio / stages,
        "(a) seconds if all its work were packed onto the cores at stage times": ideal,
        "(a) packed / measured": ideal / one.pass_s,
        "(a) share of the pass in which its slowest student learns": batches * max(one.student_s.values()) / one.pass_s,
        "(c) seconds if all its work were packed onto the cores at stage times": ideal_warm,
        "(c) packed / measured": ideal_warm / warm.pass_s,
        "(c) batches scored": warm.scored,
    }


if __name__ == "__main__":
    main()
