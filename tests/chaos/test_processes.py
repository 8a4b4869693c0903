"""Processes of a family killed at random moments; every student ends to the bit where it would have ended."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from ray.util.placement_group import placement_group_table

from cluster.evaluate.result import FamilyResult
from cluster.family import run_family
from cluster.preflight import preflight
from cluster.runs import open_run
from cluster.specfile import load_spec
from tests.chaos.families import BATCHES, FAMILY, STUDENTS, assert_survived
from tests.chaos.faults import RANK, SHARD, VICTIMS, kills
from tests.chaos.report import ChaosReport, student_recoveries
from tests.integration.conftest import run_here, write_family
from tests.processes import own_processes

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
# Nothing is killed later: on a fast machine the last student would be through before its turn to die came.
LAST = BATCHES * len(STUDENTS) * 2 // 3


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


def test_the_teacher_the_stream_and_parts_of_every_student_are_killed(
    tiny: Path, tmp_path: Path, undisturbed: FamilyResult, dice: random.Random, report: ChaosReport
) -> None:
    faults = kills([*(name for name in VICTIMS if name != SHARD), RANK, RANK], LAST, dice)
    # Once the store has all of it, a stream that is started again needs no teacher, and there is none to kill.
    faults.planned += kills([SHARD], BATCHES // 2, dice).planned
    checked = preflight(load_spec(write_family(tmp_path, tiny, STUDENTS, **FAMILY)))
    result = run_family(checked, open_run(checked.spec, False), faults)
    for seconds in student_recoveries(result.run.folder, STUDENTS, faults.kills_of_students):
        report.took("a student killed to its next step", seconds)
    with report.surviving(*faults.names):
        assert not faults.planned, faults
        assert_survived(result, checked.spec, undisturbed, report)
    # With a store only what was being scored when its teacher died may be scored again.
    again = sum(count - 1 for count in result.stats.scored.values())
    assert again <= 2
    # Nothing of the dead holds resources that the next family would miss.
    assert {group["state"] for group in placement_group_table().values()} <= {"REMOVED"}


def test_a_second_run_over_a_warm_store_needs_no_teacher(
    tiny: Path, tmp_path: Path, warm: str, undisturbed: FamilyResult, report: ChaosReport
) -> None:
    path = write_family(tmp_path, tiny, STUDENTS, store={"uri": warm}, **FAMILY)
    seen: list[int] = []
    checked = preflight(load_spec(path))
    result = run_family(checked, open_run(checked.spec, False), lambda status: seen.append(len(own_processes("Shard"))))
    assert max(seen) == 0
    assert result.stats.scored == {}
    # A student that falls behind may make the stream read a batch again.
    assert sorted(result.stats.read) == list(range(BATCHES))
    assert_survived(result, checked.spec, undisturbed, report)
