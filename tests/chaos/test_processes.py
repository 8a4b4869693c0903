"""One process of a running family killed, of each kind; every student ends to the bit where it would have ended."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
from ray.util.placement_group import placement_group_table

from cluster.evaluate.result import FamilyResult
from cluster.family import run_family
from cluster.preflight import preflight
from cluster.runs import open_run
from cluster.spec import StreamSpec
from cluster.specfile import home, load_spec
from cluster.watch import Status
from tests.chaos.families import BATCHES, FAMILY, STUDENTS, assert_survived, lives_of
from tests.chaos.faults import (
    BOARD,
    RANK,
    REGISTRY,
    SHARD,
    STREAM,
    STUDENT,
    TRAINERS,
    VICTIMS,
    Fault,
    Faults,
    kill,
)
from tests.chaos.report import ChaosReport, student_recoveries
from tests.processes import kill_one, own_processes
from tests.tiny import run_here, write_family

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
# Moments at which there is enough left to do, also on a machine that takes many steps between two looks.
EARLY, LATE = 2, BATCHES // 4
# What a student does that has taken a step and has not yet put away its model.
LEARNING = ("training", "measuring after")


@dataclass(frozen=True)
class Killer:
    """Runs families over the tiny teacher while something of theirs is killed.

    Attributes:
        undisturbed: what every student becomes when nothing happens.
    """

    tiny: Path
    folder: Path
    undisturbed: FamilyResult
    report: ChaosReport

    def run(self, students: Sequence[str], faults: Faults, **sections: Any) -> tuple[FamilyResult, dict[str, int]]:
        """A disturbed family of these students: what came of it, and how many lives each of them had."""
        chosen = {name: STUDENTS[name] for name in students}
        checked = preflight(load_spec(write_family(self.folder, self.tiny, chosen, **{**FAMILY, **sections})))
        run = open_run(checked.spec, False)
        with self.report.disturbing(run.folder, students, BATCHES, faults):
            result = run_family(checked, run, faults)
            assert not faults.planned, faults
            assert_survived(result, checked.spec, self.undisturbed)
        found = student_recoveries(run.folder, students, faults.kills_of_students)
        for seconds in found:
            self.report.took("a student killed to its next step", seconds)
        assert len(found) >= len(faults.kills_of_students)
        # Nothing of the dead holds resources that the next family would miss.
        assert {group["state"] for group in placement_group_table().values()} <= {"REMOVED"}
        return result, lives_of(run.folder, students)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The label store that the undisturbed run fills."""
    return str(tmp_path_factory.mktemp("warm"))


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, warm: str, tmp_path_factory: pytest.TempPathFactory) -> FamilyResult:
    path = write_family(tmp_path_factory.mktemp("undisturbed"), tiny, STUDENTS, store={"uri": warm}, **FAMILY)
    _, result, _ = run_here(path)
    assert result.failed == {}
    return result


@pytest.fixture
def killer(tiny: Path, tmp_path: Path, undisturbed: FamilyResult, report: ChaosReport) -> Killer:
    return Killer(tiny, tmp_path, undisturbed, report)


def all_learn(status: Status) -> bool:
    """Whether every student has begun, and a kill would take something from each that is not through."""
    left = [student for student in status.students.values() if student.phase != "finished"]
    learning = all(student.batch and student.phase in LEARNING for student in left)
    return bool(left) and learning and len(own_processes("TrainController")) == len(left)


def test_one_of_two_shards_is_killed(killer: Killer, tmp_path: Path, dice: random.Random) -> None:
    # Two shards add in another order than one, so what they teach has other last bits.
    teacher = {**FAMILY["teacher"], "shards": 2}
    (tmp_path / "undisturbed").mkdir()
    alone = {"alone": STUDENTS["alone"]}
    _, whole, _ = run_here(write_family(tmp_path / "undisturbed", killer.tiny, alone, **{**FAMILY, "teacher": teacher}))
    faults = Faults([kill(SHARD, dice.randrange(EARLY, LATE), dice)])
    result, lives = replace(killer, undisturbed=whole).run(["alone"], faults, teacher=teacher)
    assert result.stats.pool.restarts == 1
    assert lives == {"alone": 1}
    assert result.stats.scored == dict.fromkeys(range(BATCHES), 1)


def test_one_of_two_replicas_is_killed(killer: Killer, dice: random.Random) -> None:
    faults = Faults([kill(SHARD, dice.randrange(EARLY, LATE), dice)])
    result, lives = killer.run(["alone"], faults, teacher={**FAMILY["teacher"], "replicas": 2})
    assert result.stats.pool.restarts == 1
    assert lives == {"alone": 1}
    assert result.stats.scored == dict.fromkeys(range(BATCHES), 1)


def test_the_stream_is_killed(killer: Killer, dice: random.Random) -> None:
    result, lives = killer.run(["alone", "two"], Faults([kill(STREAM, dice.randrange(EARLY, LATE), dice)]))
    assert lives == {"alone": 1, "two": 1}
    # What the store did not have yet is scored again: a window of batches at most.
    assert sorted(result.stats.scored) == list(range(BATCHES))
    assert sum(result.stats.scored.values()) - BATCHES <= StreamSpec().window


@pytest.mark.parametrize("student", ["two", "three"], ids=["ZeRO-2", "ZeRO-3"])
def test_one_of_two_ranks_is_killed(killer: Killer, dice: random.Random, student: str) -> None:
    result, lives = killer.run([student], Faults([kill(RANK, dice.randrange(EARLY, LATE), dice, all_learn)]))
    assert lives == {student: 2}
    assert result.stats.scored == dict.fromkeys(range(BATCHES), 1)


def test_a_whole_student_is_killed_and_its_peers_do_not_notice(killer: Killer, dice: random.Random) -> None:
    result, lives = killer.run(list(STUDENTS), Faults([kill(STUDENT, EARLY, dice, all_learn)]))
    assert sorted(lives.values()) == [1, 1, 2]
    assert result.stats.scored == dict.fromkeys(range(BATCHES), 1)


def test_what_waits_for_the_students_is_killed(killer: Killer, dice: random.Random) -> None:
    faults = Faults([kill(TRAINERS, dice.randrange(EARLY, LATE), dice, all_learn)])
    result, lives = killer.run(["two"], faults)
    assert lives == {"two": 2}
    assert result.stats.scored == dict.fromkeys(range(BATCHES), 1)


def registers(status: Status) -> bool:
    """Whether all students have ended and MLflow is told of them."""
    return status.phase == "registering"


def first_rank(student: str) -> psutil.Process | None:
    """The process that writes a student's audit log."""
    for process in own_processes("RayTrainWorker"):
        with contextlib.suppress(psutil.Error):  # it has ended since
            if any(Path(file.path).name == f"{student}.jsonl" for file in process.open_files()):
                return process
    return None


@dataclass
class Held:
    """A student that stands still, alive, until another has ended; then the board dies that only the held one needs."""

    student: str
    process: psutil.Process | None = None

    def hold(self) -> bool:
        """Stop its first rank, and with it all that wait for that rank."""
        self.process = first_rank(self.student)
        if self.process is not None:
            self.process.suspend()
        return self.process is not None

    def another_has_ended(self, status: Status) -> bool:
        """Whether a student is through while this one is held."""
        return self.process is not None and any(each.phase == "finished" for each in status.students.values())

    def kill_the_board(self) -> bool:
        """Kill the board and let the student continue."""
        killed = kill_one(VICTIMS[BOARD])
        if killed and self.process is not None:
            self.process.resume()
        return killed


def assert_recorded_once(result: FamilyResult) -> None:
    """Every student's version and every point is in MLflow, once."""
    assert (result.unregistered, result.warnings) == ({}, [])
    client = mlflow.MlflowClient(f"sqlite:///{home() / 'mlflow.db'}")
    assert result.versions.keys() == result.students.keys()
    for name in result.versions:
        run_id = result.run.mlflow[name]
        versions = client.search_model_versions(f"name='tiny-{name}'")
        (own,) = [each for each in versions if each.run_id == run_id]
        assert int(own.version) == result.versions[name]
        assert int(client.get_model_version_by_alias(f"tiny-{name}", "challenger").version) == result.versions[name]
        assert [m.step for m in client.get_metric_history(run_id, "loss")] == list(range(1, BATCHES + 1))
        assert [p.batch for p in result.points if p.student == name] == list(range(1, BATCHES + 1))
        assert len(client.get_metric_history(run_id, "kl_after")) == 1
        assert client.get_run(run_id).info.status == "FINISHED"


def test_the_registry_and_the_board_are_killed_while_the_students_learn(killer: Killer, dice: random.Random) -> None:
    faults = Faults([kill(victim, dice.randrange(EARLY, LATE), dice, all_learn) for victim in (REGISTRY, BOARD)])
    result, lives = killer.run(["alone", "two"], faults)
    assert lives == {"alone": 1, "two": 1}
    assert result.stats.scored == dict.fromkeys(range(BATCHES), 1)
    assert_recorded_once(result)


def test_the_board_is_killed_when_a_student_has_ended_and_the_registry_while_it_registers(
    killer: Killer, dice: random.Random
) -> None:
    held = Held("two")
    faults = Faults(
        [
            Fault("a student held", dice.randrange(EARLY, LATE), held.hold, all_learn),
            Fault(BOARD, BATCHES, held.kill_the_board, held.another_has_ended),
            kill(REGISTRY, BATCHES, dice, registers),
        ]
    )
    # The other student gets to its end, however far the held one is behind.
    result, lives = killer.run(["alone", "two"], faults, stream={"window": BATCHES})
    assert lives == {"alone": 1, "two": 1}
    assert result.stats.scored == dict.fromkeys(range(BATCHES), 1)
    assert_recorded_once(result)


def test_a_second_run_over_a_warm_store_needs_no_teacher(
    tiny: Path, tmp_path: Path, warm: str, undisturbed: FamilyResult
) -> None:
    path = write_family(tmp_path, tiny, STUDENTS, store={"uri": warm}, **FAMILY)
    seen: list[int] = []
    checked = preflight(load_spec(path))
    deadline = time.monotonic() + 30
    while own_processes("Shard"):  # of the family before this one
        assert time.monotonic() < deadline
        time.sleep(0.1)
    result = run_family(checked, open_run(checked.spec, False), lambda status: seen.append(len(own_processes("Shard"))))
    assert max(seen) == 0
    assert result.stats.scored == {}
    # A student that falls behind may make the stream read a batch again.
    assert sorted(result.stats.read) == list(range(BATCHES))
    assert_survived(result, checked.spec, undisturbed)
