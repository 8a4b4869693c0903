"""Families that are disturbed, and what must hold of them afterwards."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cluster.audit import AUDIT_FOLDER, problems_of, steps_of
from cluster.corpus.batches import CORPUS_FOLDER, Batches
from cluster.evaluate.result import FamilyResult
from tests.chaos.report import ChaosReport
from tests.integration.heads import environment, stillhouse
from tests.integration.test_command_line import final_weights

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


# Batches that a student may learn again after it was started anew. Two commits may be under way; one is slack.
BACK_AT_MOST = 3 * FAMILY["checkpoints"]["every"]


def assert_went_on(folder: Path, students: Iterable[str]) -> None:
    """No student of a run has begun again further back than its commits allow: what it had was taken up."""
    for name in students:
        reached = 0
        for line in (folder / AUDIT_FOLDER / f"{name}.jsonl").read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a line that a death cut short
                facts = json.loads(line)
                assert "batch" in facts or facts["life"] >= reached - BACK_AT_MOST, (name, reached, facts)
                reached = max(reached, facts.get("batch", -1) + 1)


def weights(result: FamilyResult, student: str) -> dict[str, torch.Tensor]:
    """A finished student's weights."""
    return load_file(Path(result.students[student].model_dir) / "model.safetensors")


def assert_same_weights(own: dict[str, torch.Tensor], other: dict[str, torch.Tensor], name: str) -> None:
    """Two states of a student are the same to the bit."""
    assert own.keys() == other.keys()
    assert all(torch.equal(own[key], other[key]) for key in own), name


def assert_learnt_once(result: FamilyResult, spec: Any, name: str) -> None:
    """A student's audit log has each batch once, in order."""
    batches = Batches(result.run.folder / CORPUS_FOLDER, spec.corpus, spec.evaluation.batches)
    assert problems_of(result.run.folder, name, batches) == []


def lives_of(folder: Path, students: Iterable[str]) -> dict[str, int]:
    """How often each student of a run has begun to learn."""
    return {name: steps_of(folder, name)[1] for name in students}


def assert_survived(result: FamilyResult, spec: Any, undisturbed: FamilyResult) -> None:
    """Every student finished, learnt each batch once, and is to the bit what it would have been."""
    assert result.failed == {}
    assert_went_on(result.run.folder, spec.students)
    for name in spec.students:
        assert_learnt_once(result, spec, name)
        assert_same_weights(weights(result, name), weights(undisturbed, name), name)


def learnt(home: Path) -> int:
    """Steps that all students of the runs in a home have taken."""
    logs = (home / "stillhouse" / "runs").glob("*/*/audit/*.jsonl")
    return sum(line.count('"loss"') for log in logs for line in log.read_text().splitlines())


def assert_finished_as(
    undisturbed: dict[str, dict[str, torch.Tensor]],
    home: Path,
    report: ChaosReport,
    batches: int = BATCHES,
    **more: str,
) -> str:
    """The run in a home is finished, learnt each batch once, and is to the bit what it would have been.

    Args:
        more: of the command's environment.

    Returns:
        What ``stillhouse audit`` prints.
    """
    (run,) = (home / "stillhouse" / "runs" / "tiny").iterdir()
    report.learnt(run, undisturbed, batches)
    assert_went_on(run, undisturbed)
    disturbed = final_weights(home)
    assert set(disturbed) == set(undisturbed)
    for name, own in disturbed.items():
        assert_same_weights(own, undisturbed[name], name)
    audit = stillhouse("audit", run.name, env=environment(home, **more))
    assert audit.returncode == 0, audit.stdout + audit.stderr
    assert audit.stdout.count("each batch once, in order") == len(undisturbed)
    return audit.stdout
