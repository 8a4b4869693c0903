"""What Ray, Ray Train and torch raise comes to one line; the texts beside this file are Ray 2.60's own."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError
from ray.train import ControllerError, TrainingFailedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from cluster.errors import RunError, UserError, death_of, first_line

CHANGE = "lower micro_batch"


def text(name: str) -> str:
    return (Path(__file__).parent / "ray_errors" / f"{name}.txt").read_text()


def wrapped(error: Exception) -> list[Exception]:
    """An error as it is, as Ray Train hands it on, and after it has been through another process."""
    lost = WorkerHealthCheckFailedError("A worker health check failed.", error)
    return [error, lost, ControllerError(error), pickle.loads(pickle.dumps(lost))]


def test_a_kill_by_ray_s_memory_monitor_names_process_node_memory_and_remedy() -> None:
    for error in wrapped(OutOfMemoryError(text("memory_monitor"))):
        assert first_line(error, CHANGE) == (
            "Ray killed student:A.__init__ (process 14036, 0.04GB) because node 192.0.2.2 ran out of memory: 12.56GB "
            "of 23.54GB in use, most of it by ray::RayTrainWorker 2.67GB, ray::RayTrainWorker 1.89GB, "
            ".venv/bin/python benchmarks/loss.py --sm 0.71GB; lower micro_batch"
        )


@pytest.mark.parametrize(("name", "pid"), [("killed", 13543), ("exited_at_start", 13659)])
def test_a_sigkill_and_an_exit_name_process_and_node_and_what_they_may_be(name: str, pid: int) -> None:
    for error in wrapped(RayActorError("0" * 32, text(name))):
        line = first_line(error, CHANGE)
        assert line.startswith(f"process {pid} on node 192.0.2.2 ended without a Python error")
        assert line.endswith("no memory left (dmesg on that node shows it); if it was, lower micro_batch")
        assert "--enable-resource-isolation" not in line and "\n" not in line


def test_a_task_whose_process_died_says_so() -> None:
    assert first_line(WorkerCrashedError(), CHANGE).startswith("its process ended without a Python error")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_memory_that_python_finds_missing_comes_with_the_remedy(error: type[Exception]) -> None:
    said = {
        torch.OutOfMemoryError: "CUDA out of memory. Tried to allocate 2.00 GiB. If reserved but unallocated memory is",
        MemoryError: "",
        RuntimeError: "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.",
    }[error]
    line = first_line(error(said), CHANGE)
    assert line.startswith(f"{error.__name__}: ") and line.endswith(f"; {CHANGE}")
    assert "unallocated" not in line


def test_other_errors_are_their_last_line_and_ours_their_own() -> None:
    failure = ValueError("first\nlast\n")
    assert first_line(failure, CHANGE) == "ValueError: last"
    assert first_line(ValueError(), CHANGE) == "ValueError: no message"
    assert first_line(OSError("no file: out of memory.txt"), CHANGE) == "OSError: no file: out of memory.txt"
    assert first_line(RayTaskError("f", "Traceback\nValueError: last", failure)) == "ValueError: last"
    for ours in (UserError("corpus: what to do"), ControllerError(RunError("corpus: what to do"))):
        assert first_line(ours, CHANGE) == "corpus: what to do"
    assert issubclass(ControllerError, TrainingFailedError)


def test_a_text_on_something_else_is_no_death() -> None:
    assert death_of("The deployment failed to start.\nValueError: out of memory of it", CHANGE) == ""
