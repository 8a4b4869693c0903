"""What is done where a student's Ray Train run is steered: in a process of its own, which needs no torch of ours."""

from __future__ import annotations

from functools import partial
from typing import Any

import ray.train

from cluster.board import NO_PLACE
from cluster.space import when_there_is_room
from cluster.students.job import StudentJob
from cluster.students.snapshot import keep


class Steering(ray.train.UserCallback):
    """Keeps a copy of Ray Train's list of checkpoints, and says when a student has lost its ranks."""

    def __init__(self, job: StudentJob) -> None:
        self._job = job

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """A checkpoint is complete and in Ray Train's list."""
        folder = self._job.folder
        # An older copy would name checkpoints that are no more.
        when_there_is_room(folder, partial(keep, folder), self._job.family.patience_s)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Ranks have failed or died; those of the next life say themselves when they have a place."""
        self._job.board.phase.remote(self._job.name, NO_PLACE)


def rank(config: dict[str, StudentJob]) -> None:
    """Ray Train's per-worker function. What trains is imported in the ranks: who only names it would wait for it."""
    from cluster.students.loop import train_student

    train_student(config["job"])
