"""A whole family on one GPU: teacher, students and arms each take a part of it."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.heads import environment, start, stillhouse
from tests.processes import kill_one
from tests.tiny import write_family

pytestmark = [pytest.mark.integration, pytest.mark.gpu, pytest.mark.timeout(600)]
SHARE = 0.15
COMMON = {"init": {"source": "teacher", "layers": 2}, "lr": 3e-3, "micro_batch": 4, "gpus_per_rank": SHARE}
STUDENTS: dict[str, dict[str, Any]] = {
    "one": {**COMMON, "zero_stage": 1},
    "two": {**COMMON, "zero_stage": 2, "micro_batch": 2, "precision": "float32"},
    "three": {**COMMON, "zero_stage": 3, "gradient_checkpointing": True},
}


def sections(batches: int) -> dict[str, Any]:
    return {
        "teacher": {"gpus_per_shard": 2 * SHARE, "dtype": "bfloat16"},
        "corpus": {"max_batches": batches, "epochs": 8, "held_out": 0.2},
        "evaluation": {"batches": 2, "angle_every": 10},
    }


def learnt(output: str, names: list[str], batches: int, env: dict[str, str]) -> str:
    """What the audit says of a run by its output, once every student has come closer to the teacher."""
    for name in names:
        row = re.search(rf"^│ {name} .*│", output, re.MULTILINE)
        assert row, output
        _, before, after, _, _, registered, *_ = [cell.strip() for cell in row[0].strip("│").split("│")][1:]
        assert float(after) < float(before), row[0]
        assert registered == f"tiny-{name} v1"
    run = re.search(r"run (tiny-\S+), log", output)
    assert run, output
    audit = stillhouse("audit", run[1], env=env)
    assert audit.returncode == 0, audit.stdout + audit.stderr
    for name in names:
        assert f"{name}: {batches} of {batches} batches in " in audit.stdout
    return audit.stdout


def test_three_students_learn_on_a_gpu_one_is_killed_and_all_are_served(tiny: Path, tmp_path: Path) -> None:
    serving = {"gpus_per_arm": SHARE, "requests": 4}
    path = write_family(tmp_path, tiny, STUDENTS, **sections(300), checkpoints={"every": 20}, serving=serving)
    env = environment(tmp_path)
    run = start("run", str(path), env=env)
    deadline = time.monotonic() + 300
    while len({commit.parents[1] for commit in tmp_path.rglob("checkpoint_*/commit.json")}) < len(STUDENTS):
        assert run.poll() is None and time.monotonic() < deadline, run.communicate(timeout=60)[0]
        time.sleep(0.05)
    assert kill_one("RayTrainWorker")
    output = run.communicate(timeout=300)[0]
    assert run.returncode == 0, output
    audit = learnt(output, list(STUDENTS), 300, env)
    assert audit.count(" in 2 lives;") == 1


def test_hidden_states_stay_exact_on_a_gpu(tiny: Path, tmp_path: Path) -> None:
    path = write_family(tmp_path, tiny, {"three": STUDENTS["three"]}, **sections(24), labels={"kind": "hidden"})
    env = environment(tmp_path)
    done = stillhouse("run", str(path), env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    learnt(done.stdout, ["three"], 24, env)
