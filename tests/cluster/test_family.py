"""The driver of a family: what it tells MLflow at the start and at the end, and how it waits in between."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.board import FAMILY
from cluster.family import POLL_S, _Ends, _open_runs, _report_the_end
from cluster.limits import NO_LIMIT
from cluster.models import TeacherModel
from cluster.preflight import Checked
from cluster.records import Records
from cluster.runs import Run, last_run, open_run
from cluster.spec import FamilySpec
from cluster.students.champions import Champions
from tests.cluster.test_records import Cluster, Service, points, records_of
from tests.cluster.test_records import service as service
from tests.tiny import tiny_family


def checked_of(**fields: Any) -> Checked:
    """A family that has passed its checks."""
    spec = FamilySpec.model_validate(tiny_family(**fields))
    return Checked(spec, TeacherModel("/teacher", 300, "0" * 16, "1" * 16), {}, "sqlite:///x.db", None, NO_LIMIT)


def ends_of(records: Records, service: Service, tasks: dict[Any, str]) -> tuple[_Ends, list[tuple[str, str]]]:
    """The driver's part that waits for these students, and the phases that it posts."""
    phases: list[tuple[str, str]] = []
    board: Any = SimpleNamespace(phase=SimpleNamespace(remote=lambda *given: phases.append(given)))
    champions = Champions(service, "", {}, {}, records.calls)  # type: ignore[arg-type]
    return _Ends(checked_of(), board, records, {}, tasks, champions), phases


def test_mlflow_s_answers_do_not_set_the_pace_of_the_loop(tmp_path: Path, service: Service) -> None:
    records, run = records_of(tmp_path, service)
    ends, _ = ends_of(records, service, {object(): "small"})
    begun = service.cluster.now
    for count in range(1, 11):
        records.log(points(count))  # MLflow answers at once
        assert ends.wait() == []
        assert run.logged == {"small": count, "large": count}
    assert service.cluster.now - begun == 10 * POLL_S


def test_a_student_s_end_ends_the_wait_at_once(tmp_path: Path, service: Service) -> None:
    records, _ = records_of(tmp_path, service)
    task = service.cluster.call(lambda: None)
    ends, _ = ends_of(records, service, {object(): "large", task: "small"})
    begun = service.cluster.now
    assert (ends.wait(), service.cluster.now) == ([task], begun)


def test_a_student_s_failure_names_the_kind_of_its_error(tmp_path: Path, service: Service) -> None:
    records, _ = records_of(tmp_path, service)
    tasks = {service.cluster.call(lambda: {}["layers.3"]): "small"}
    ends, phases = ends_of(records, service, tasks)
    for ref in ends.wait():
        ends.take(ref)
    assert ends.failed == {"small": "KeyError: 'layers.3'"}
    assert (phases, tasks) == ([("small", "failed")], {})


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_that_ends_early_closes_registered_students_as_finished(
    tmp_path: Path, service: Service, killed: bool
) -> None:
    _, run = records_of(tmp_path, service)
    run.versions = {"small": 1}
    _report_the_end(service, run, killed)  # type: ignore[arg-type]
    assert service.closed == [(["small"], []), ([FAMILY, "large"], [FAMILY, "large"], killed)]


def test_a_driver_that_dies_while_its_runs_are_opened_finds_them_again(
    stillhouse_home: Path, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = checked_of()
    run = open_run(checked.spec, resume=False)

    def opened(run: Run) -> None:
        records = Records(service, run, checked.spec)  # type: ignore[arg-type]
        _open_runs(checked, run, service, records, {}, lambda _: None)  # type: ignore[arg-type]

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Cluster, "result", die)
        with pytest.raises(KeyboardInterrupt):
            opened(run)
    resumed = open_run(checked.spec, resume=True)
    assert resumed.mlflow == {}
    opened(resumed)
    first, second = service.started
    assert first == second == last_run("tiny").start != ""
    assert last_run("tiny").mlflow[FAMILY] == "run-"


def test_a_start_with_other_parameters_opens_other_runs(stillhouse_home: Path) -> None:
    run = open_run(checked_of().spec, resume=False)
    run.start = "key"
    run.save()
    assert open_run(checked_of().spec, resume=True).start == "key"
    other = checked_of(serving={"requests": 3}).spec
    assert open_run(other, resume=True).start == ""
