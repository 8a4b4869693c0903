"""Families that are disturbed at random moments, and what must hold of them afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cluster.audit import problems_of
from cluster.corpus.batches import CORPUS_FOLDER, Batches
from cluster.evaluate.result import FamilyResult
from cluster.watch import Status
from tests.conftest import CHAOS_SEED
from tests.integration.conftest import ray_cluster, s3, s3_environment, tiny, write_family  # noqa: F401
from tests.integration.test_command_line import environment, final_weights, stillhouse

BATCHES = 40
SAME: dict[str, Any] = {"init": {"source": "teacher", "layers": 2}, "precision": "float32", "max_failures": 20}
STUDENTS: dict[str, dict[str, Any]] = {
    "alone": {**SAME, "zero_stage": 1, "micro_batch": 4},
    "two": {**SAME, "zero_stage": 2, "ranks": 2, "micro_batch": 2},
    "three": {**SAME, "zero_stage": 3, "ranks": 2, "micro_batch": 1},
}
FAMILY: dict[str, Any] = {
    "corpus": {"max_batches": BATCHES},
    "checkpoints": {"every": 4},
    "evaluation": {"batches": 1, "angle_every": None},
    "teacher": {"max_restarts": 100},
}


@pytest.fixture(scope="session")
def dice() -> random.Random:
    """Random moments, from the seed that every run prints first."""
    return random.Random(CHAOS_SEED)


@dataclass
class Faults:
    """Faults that wait for their moment; given to a run as what it reports its status to.

    Args:
        planned: moments, as batches that all students together have learnt, and what is done then. What returns False
            could not be done yet and is tried again.
    """

    planned: list[tuple[int, Callable[[], bool]]]
    done: list[int] = field(default_factory=list)

    def __call__(self, status: Status) -> None:
        """Do what is due."""
        learnt = sum(student.batch for student in status.students.values())
        due = [fault for fault in self.planned if fault[0] <= learnt]
        # One at a time: the next one finds what the one before left.
        if due and min(due, key=lambda fault: fault[0])[1]():
            fault = min(due, key=lambda fault: fault[0])
            self.planned.remove(fault)
            self.done.append(learnt)


def weights(result: FamilyResult, student: str) -> dict[str, torch.Tensor]:
    """A finished student's weights."""
    return load_file(Path(result.students[student].model_dir) / "model.safetensors")


def assert_survived(result: FamilyResult, spec: Any, undisturbed: FamilyResult) -> None:
    """Every student finished, learnt each batch once, and is to the bit what it would have been."""
    assert result.failed == {}
    batches = Batches(result.run.folder / CORPUS_FOLDER, spec.corpus, spec.evaluation.batches)
    for name in spec.students:
        assert problems_of(result.run.folder, name, batches) == []
        own, other = weights(result, name), weights(undisturbed, name)
        assert own.keys() == other.keys()
        assert all(torch.equal(own[key], other[key]) for key in own), name


PAIR = {name: STUDENTS[name] for name in ("alone", "two")}


def learnt(home: Path) -> int:
    """Steps that all students of the runs in a home have taken."""
    logs = (home / "stillhouse" / "runs").glob("*/*/audit/*.jsonl")
    return sum(line.count('"loss"') for log in logs for line in log.read_text().splitlines())


@pytest.fixture(scope="session")
def undisturbed_pair(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:  # noqa: F811
    """What the two students of :data:`PAIR` become when nothing happens."""
    home = tmp_path_factory.mktemp("undisturbed-pair")
    whole = stillhouse("run", str(write_family(home, tiny, PAIR, **FAMILY)), env=environment(home), timeout=500)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    return final_weights(home)


def assert_finished_as(undisturbed: dict[str, dict[str, torch.Tensor]], home: Path, **more: str) -> str:
    """The run in a home is finished, learnt each batch once, and is to the bit what it would have been.

    Args:
        more: of the command's environment.

    Returns:
        What ``stillhouse audit`` prints.
    """
    disturbed = final_weights(home)
    assert set(disturbed) == set(undisturbed)
    for name, own in disturbed.items():
        assert own.keys() == undisturbed[name].keys()
        assert all(own[key].equal(undisturbed[name][key]) for key in own), name
    run = next((home / "stillhouse" / "runs" / "tiny").iterdir())
    audit = stillhouse("audit", run.name, env=environment(home, **more))
    assert audit.returncode == 0, audit.stdout + audit.stderr
    assert audit.stdout.count("each batch once, in order") == len(undisturbed)
    return audit.stdout
