"""What is done where a student's Ray Train run is steered: in a process of its own, which needs no torch of ours."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ReschedulingState, RestartingState
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.board import STARTING, STARTING_AGAIN
from cluster.errors import RunError, first_line
from cluster.space import when_there_is_room
from cluster.students.job import StudentJob
from cluster.students.snapshot import keep

log = logging.getLogger(__name__)

LESS_MEMORY = (
    "lower the student's micro_batch, raise its zero_stage or ranks, set its gradient_checkpointing, or run fewer "
    "families on that node"
)
# Of a reason, on the display; the log has all of it.
SHOWN = 200
DEAD_PROCESS = re.compile(r"\tpid: (?P<pid>\d+)\n(?:.*\n)*?\tip: (?P<ip>\S+)")
LAST_LINES, LOOK_S = 5, 30.0


class Steering(ray.train.UserCallback):
    """Keeps a copy of Ray Train's list of checkpoints."""

    def __init__(self, job: StudentJob) -> None:
        self._job = job

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """A checkpoint is complete and in Ray Train's list."""
        folder = self._job.folder
        # An older copy would name checkpoints that are no more.
        when_there_is_room(folder, partial(keep, folder), self._job.family.patience_s)


class Restarts(ControllerCallback):
    """Reports why a student's ranks are started again, and how often; fails the student where Ray Train would not.

    Ray Train limits the restarts of ranks that fail while they train. Those that fail before, it starts again without
    limit and without a message, as it does when there is no place for them.
    """

    def __init__(self, job: StudentJob) -> None:
        self._job, self._failures = job, 0

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """The run goes from one state to the next.

        Raises:
            RunError: the ranks have failed more often than ``max_failures`` allows.
        """
        if not isinstance(current_state, RestartingState | ReschedulingState):
            return
        error = current_state.training_failed_error
        if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
            self._job.board.phase.remote(self._job.name, STARTING)
            return
        self._failures += 1
        reason, allowed = rank_failure(error), self._job.spec.max_failures
        if self._failures > allowed:
            raise RunError(
                f"its ranks failed {self._failures} times, max_failures is {allowed}; the last time: {reason}"
            )
        log.warning("student %s is started again (%d of %d): %s", self._job.name, self._failures, allowed, reason)
        self._job.board.phase.remote(
            self._job.name, f"{STARTING_AGAIN} ({self._failures} of {allowed}): {shorten(reason, SHOWN)}"
        )


def rank_failure(error: BaseException) -> str:
    """Why a student's ranks have failed, in one line: the one that failed first, as far as that can be known.

    Args:
        error: Ray Train's.
    """
    failures = getattr(error, "worker_failures", None)
    if not failures:
        cause = getattr(error, "controller_failure", error)
        # Of ranks that died at their start it is in a message of Ray Train's own.
        return _of_one((isinstance(cause, WorkerGroupStartupFailedError) and cause.__cause__) or cause)
    # The others lose their connection to one that has died.
    died = {number: each for number, each in failures.items() if hasattr(each, "health_check_failure")}
    number, cause = min((died or failures).items())
    return f"rank {number}: {_of_one(cause)}"


def _of_one(error: BaseException) -> str:
    about = _aftermath(str(getattr(error, "health_check_failure", error)))
    return "; ".join(part for part in (first_line(error, LESS_MEMORY), *about) if part)


def _aftermath(death: str) -> tuple[str, ...]:
    """What the node of a process that died knows of it; empty where the node is gone, or where no process died.

    Args:
        death: Ray's text on the death of an actor.
    """
    found = DEAD_PROCESS.search(death)
    alive = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]} if found else {}
    if found is None or found["ip"] not in alive:
        return ()
    there = NodeAffinitySchedulingStrategy(alive[found["ip"]], soft=False)
    try:
        about: tuple[str, str] = ray.get(
            _look.options(scheduling_strategy=there).remote(int(found["pid"])), timeout=LOOK_S
        )
    except RayError as error:
        log.warning("node %s does not tell why its process %s died: %s", found["ip"], found["pid"], error)
        return ()
    return about


@ray.remote(num_cpus=0, max_retries=0)
def _look(pid: int) -> tuple[str, str]:
    """This node's memory, and the last lines that one of its worker processes wrote to stderr."""
    folder = Path(ray._private.worker._global_node.get_logs_dir_path())
    lines = [
        line for path in folder.glob(f"worker-*-{pid}.err") for line in path.read_text(errors="replace").splitlines()
    ]
    # Ray's own begin with a colon.
    last = [line.strip() for line in lines if line.strip() and not line.startswith(":")][-LAST_LINES:]
    return _memory(Path("/proc")), f"it last wrote: {' | '.join(last)}" if last else ""


def _memory(proc: Path) -> str:
    """How much of a Linux machine's memory is in use, and how often its kernel had to kill a process for it."""
    if not (proc / "vmstat").exists():
        return ""
    gb = {name: int(rest.split()[0]) / 1e6 for name, rest in _fields(proc / "meminfo", ":")}
    kills = dict(_fields(proc / "vmstat", " ")).get("oom_kill", "an unknown number of")
    used = gb["MemTotal"] - gb["MemAvailable"]
    return (
        f"{used:.1f} of {gb['MemTotal']:.1f} GB are in use there now, and its kernel has killed {kills} processes for "
        f"memory since it started"
    )


def _fields(path: Path, separator: str) -> Iterator[tuple[str, str]]:
    for line in path.read_text().splitlines():
        name, _, value = line.partition(separator)
        yield name, value


def rank(config: dict[str, StudentJob]) -> None:
    """Ray Train's per-worker function. What trains is imported in the ranks: who only names it would wait for it."""
    from cluster.students.loop import train_student

    train_student(config["job"])
