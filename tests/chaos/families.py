"""Families that are disturbed, and what must hold of them afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cluster.audit import problems_of
from cluster.corpus.batches import CORPUS_FOLDER, Batches
from cluster.evaluate.result import FamilyResult
from tests.chaos.report import ChaosReport
from tests.integration.test_command_line import environment, final_weights, stillhouse

BATCHES = 40
SAME: dict[str, Any] = {"init": {"source": "teacher", "layers": 2}, "precision": "float32", "max_failures": 20}
STUDENTS: dict[str, dict[str, Any]] = {
    "alone": {**SAME, "zero_stage": 1, "micro_batch": 4},
    "two": {**SAME, "zero_stage": 2, "ranks": 2, "micro_batch": 2},
    "three": {**SAME, "zero_stage": 3, "ranks": 2, "micro_batch": 1},
}
PAIR = {name: STUDENTS[name] for name in ("alone", "two")}
FAMILY: dict[str, Any] = {
    "corpus": {"max_batches": BATCHES},
    "checkpoints": {"every": 4},
    "evaluation": {"batches": 1, "angle_every": None},
    "teacher": {"max_restarts": 100},
}


def weights(result: FamilyResult, student: str) -> dict[str, torch.Tensor]:
    """A finished student's weights."""
    return load_file(Path(result.students[student].model_dir) / "model.safetensors")


def assert_survived(result: FamilyResult, spec: Any, undisturbed: FamilyResult, report: ChaosReport) -> None:
    """Every student finished, learnt each batch once, and is to the bit what it would have been."""
    report.learnt(result.run.folder, spec.students, BATCHES)
    assert result.failed == {}
    batches = Batches(result.run.folder / CORPUS_FOLDER, spec.corpus, spec.evaluation.batches)
    for name in spec.students:
        assert problems_of(result.run.folder, name, batches) == []
        own, other = weights(result, name), weights(undisturbed, name)
        assert own.keys() == other.keys()
        assert all(torch.equal(own[key], other[key]) for key in own), name


def learnt(home: Path) -> int:
    """Steps that all students of the runs in a home have taken."""
    logs = (home / "stillhouse" / "runs").glob("*/*/audit/*.jsonl")
    return sum(line.count('"loss"') for log in logs for line in log.read_text().splitlines())


def assert_finished_as(
    undisturbed: dict[str, dict[str, torch.Tensor]], home: Path, report: ChaosReport, **more: str
) -> str:
    """The run in a home is finished, learnt each batch once, and is to the bit what it would have been.

    Args:
        more: of the command's environment.

    Returns:
        What ``stillhouse audit`` prints.
    """
    run = next((home / "stillhouse" / "runs" / "tiny").iterdir())
    report.learnt(run, undisturbed, BATCHES)
    disturbed = final_weights(home)
    assert set(disturbed) == set(undisturbed)
    for name, own in disturbed.items():
        assert own.keys() == undisturbed[name].keys()
        assert all(own[key].equal(undisturbed[name][key]) for key in own), name
    audit = stillhouse("audit", run.name, env=environment(home, **more))
    assert audit.returncode == 0, audit.stdout + audit.stderr
    assert audit.stdout.count("each batch once, in order") == len(undisturbed)
    return audit.stdout
