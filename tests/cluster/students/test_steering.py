"""Ranks that fail are counted and shown, and a student whose ranks never come up fails."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.controller.state import ErroredState, ReschedulingState, RestartingState

from cluster.board import STARTING, has_no_rank
from cluster.errors import RunError
from cluster.students.steering import Restarts, _memory, rank_failure
from tests.cluster.test_errors import text


@pytest.fixture(autouse=True)
def _no_node_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", list)


@pytest.fixture
def phases() -> list[str]:
    return []


@pytest.fixture
def restarts(phases: list[str]) -> Restarts:
    phase = SimpleNamespace(remote=lambda _, phase: phases.append(phase))
    job: Any = SimpleNamespace(name="small", board=SimpleNamespace(phase=phase), spec=SimpleNamespace(max_failures=2))
    return Restarts(job)


def died_at_start() -> ControllerError:
    cause = WorkerGroupStartupFailedError("One of the worker actors failed to initialize due to error:")
    cause.__cause__ = RayActorError("0" * 32, text("exited_at_start"))
    return ControllerError(cause)


def raised(*errors: Exception) -> WorkerGroupError:
    return WorkerGroupError("what Ray Train prints", dict(enumerate(errors)))


def test_each_restart_is_shown_with_its_number_and_cause_and_the_last_is_the_end(
    restarts: Restarts, phases: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        restarts.after_controller_state_update(None, ReschedulingState(died_at_start()))
        restarts.after_controller_state_update(None, RestartingState(raised(ImportError("no module named flash"))))
    assert phases[0].startswith("starting again (1 of 2): process 13659 on node 192.0.2.2 ended without a Python error")
    assert phases[1] == "starting again (2 of 2): rank 0: ImportError: no module named flash"
    assert all(map(has_no_rank, phases)) and not has_no_rank("training")
    assert "lower the student's micro_batch" in caplog.text
    with pytest.raises(RunError, match="failed 3 times, max_failures is 2; the last time: process 13659 on node"):
        restarts.after_controller_state_update(None, ReschedulingState(died_at_start()))
    assert len(phases) == 2


def test_waiting_for_a_place_is_no_failure(restarts: Restarts, phases: list[str]) -> None:
    for _ in range(5):
        error = ControllerError(WorkerGroupStartupTimeoutError(1))
        restarts.after_controller_state_update(None, ReschedulingState(error))
    assert phases == [STARTING] * 5


def test_the_end_of_a_run_is_not_a_restart(restarts: Restarts, phases: list[str]) -> None:
    restarts.after_controller_state_update(None, ErroredState(raised(ValueError("over"))))
    assert phases == []


def test_the_rank_that_died_is_named_not_those_that_lost_their_connection_to_it() -> None:
    died = WorkerHealthCheckFailedError("A worker health check failed.", RayActorError("0" * 32, text("killed")))
    assert rank_failure(raised(RuntimeError("Connection closed by peer"), died)).startswith("rank 1: process 13543 on")
    assert rank_failure(raised(ValueError("one"), ValueError("two"))) == "rank 0: ValueError: one"


def test_a_node_tells_its_memory_and_what_its_kernel_has_killed(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       16000000 kB\nMemAvailable:    1500000 kB\nHugePages_Total:  0\n")
    (tmp_path / "vmstat").write_text("nr_free_pages 1\noom_kill 3\n")
    assert _memory(tmp_path) == (
        "14.5 of 16.0 GB are in use there now, and its kernel has killed 3 processes for memory since it started"
    )
    (tmp_path / "vmstat").unlink()
    assert _memory(tmp_path) == ""
    assert "GB are in use there now" in _memory(Path("/proc"))
