"""What is done where a student's Ray Train run is steered: in a process of its own, which needs no torch of ours."""

from __future__ import annotations

import logging
import re
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

from cluster.board import NO_PLACE, STARTING_AGAIN
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
LAST_LINES, TAIL_S = 5, 30.0


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
            self._job.board.phase.remote(self._job.name, NO_PLACE)
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
    last = last_words(str(getattr(error, "health_check_failure", error)))
    return first_line(error, LESS_MEMORY) + (f"; it last wrote: {last}" if last else "")


def last_words(death: str) -> str:
    """The last lines that a process wrote to stderr, from the node where it ran; empty where they cannot be had.

    Args:
        death: Ray's text on the death of an actor.
    """
    found = DEAD_PROCESS.search(death)
    alive = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]} if found else {}
    if found is None or found["ip"] not in alive:
        return ""
    there = NodeAffinitySchedulingStrategy(alive[found["ip"]], soft=False)
    try:
        lines: list[str] = ray.get(_tail.options(scheduling_strategy=there).remote(int(found["pid"])), timeout=TAIL_S)
    except RayError as error:
        log.warning("the last lines of process %s on node %s cannot be read: %s", found["pid"], found["ip"], error)
        return ""
    return " | ".join(lines)


@ray.remote(num_cpus=0, max_retries=0)
def _tail(pid: int) -> list[str]:
    """The last lines of a worker process of this node; Ray's own, which begin with a colon, are left out."""
    folder = Path(ray._private.worker._global_node.get_logs_dir_path())
    lines = [
        line for path in folder.glob(f"worker-*-{pid}.err") for line in path.read_text(errors="replace").splitlines()
    ]
    return [line.strip() for line in lines if line.strip() and not line.startswith(":")][-LAST_LINES:]


def rank(config: dict[str, StudentJob]) -> None:
    """Ray Train's per-worker function. What trains is imported in the ranks: who only names it would wait for it."""
    from cluster.students.loop import train_student

    train_student(config["job"])
