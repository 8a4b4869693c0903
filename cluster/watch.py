"""Reads the board and the stream while a family runs, and says in one snapshot where it stands."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError

from cluster.board import FAMILY, NO_PLACE, Point
from cluster.errors import RunError, first_line
from cluster.session import ACTOR_LOST
from cluster.stream.figures import StreamStats

# Batches that may be on their way to the store without a word.
UNSAVED_SHOWN = 4
# Seconds between two points of the family's own curves.
FAMILY_EVERY_S = 10.0
# How long the stream may take for one answer, and how long it may be away beside the patience that it has with a full
# disk: it begins with a look into the store, which may be away too.
ANSWER_S = 10.0
AWAY_S = 600.0


@dataclass(frozen=True)
class StudentStatus:
    """A student in the display. ``metrics`` is its last point, empty before the first."""

    phase: str
    batch: int
    metrics: dict[str, float]
    waited_s: float


@dataclass(frozen=True)
class Status:
    """Where a family stands.

    Attributes:
        phase: what is going on, in a few words.
        stats: the stream's, none before it started.
        more: of the phase; what changes while the phase stays the same.
    """

    phase: str
    students: dict[str, StudentStatus] = field(default_factory=dict)
    stats: StreamStats | None = None
    more: str = ""

    @property
    def waits(self) -> str:
        """Who waits for whom, in words; empty when nobody does."""
        if self.stats is None:
            return ""
        if self.stats.unsaved > UNSAVED_SHOWN:
            return f"{self.stats.unsaved} batches wait for the label store to take them"
        if self.stats.blocked_by:
            return f"the teacher waits for {self.stats.blocked_by}"
        if self.stats.waiting:
            return f"{', '.join(self.stats.waiting)} wait{'s' * (len(self.stats.waiting) == 1)} for the teacher"
        return ""


class Watch:
    """Collects the points of a run; each is handed on once.

    Args:
        patience_s: how long a full disk is waited for.

    Attributes:
        points: those of the students.
    """

    def __init__(self, stream: ActorHandle, board: ActorHandle, students: list[str], patience_s: float) -> None:
        self._longest_s = patience_s + AWAY_S
        self._stream, self._board, self._students = stream, board, students
        self._family_at, self._answered_at = float("-inf"), time.monotonic()
        self.points: list[Point] = []
        self._last: dict[str, Point] = {}
        self._stats: StreamStats | None = None

    def look(self, phase: str) -> tuple[Status, list[Point]]:
        """The present status, and the points that are new since the last look, every few seconds the family's too.

        Raises:
            RunError: a part of the run has said that the whole cannot go on, and why, or the stream is gone for good.
        """
        new, phases, stop = ray.get(self._board.since.remote(len(self.points)))
        if stop:
            raise RunError(stop)
        fresh = self._ask_stream()
        stats = self._stats
        self.points += new
        self._last.update({point.student: point for point in new})
        students = {}
        for name in self._students:
            point = self._last.get(name)
            students[name] = StudentStatus(
                phases.get(name, NO_PLACE),
                point.batch if point else 0,
                point.metrics if point else {},
                stats.waited_s.get(name, 0.0) if stats else 0.0,
            )
        if fresh is not None and time.monotonic() - self._family_at >= FAMILY_EVERY_S:
            self._family_at = time.monotonic()
            new.append(family_point(students, fresh))
        return Status(phase, students, stats), new

    def _ask_stream(self) -> StreamStats | None:
        """The stream's snapshot; none while it is away, when it is started again and its readers wait for it.

        Raises:
            RunError: it has been away for too long.
        """
        try:
            self._stats = ray.get(self._stream.stats.remote(), timeout=ANSWER_S)
        except (*ACTOR_LOST, GetTimeoutError) as error:
            away_s = time.monotonic() - self._answered_at
            if away_s > self._longest_s:
                raise RunError(
                    f"the stream has not answered for {away_s:.0f} s: {first_line(error)}; go on with --resume"
                ) from error
            return None
        self._answered_at = time.monotonic()
        return self._stats


def family_point(students: Mapping[str, StudentStatus], stats: StreamStats) -> Point:
    """How the pool and the stream stand, and who lags behind or waits."""
    metrics: dict[str, float] = {
        "teacher/replicas_ready": stats.pool.ready,
        "stream/window_used": stats.window_used,
        "stream/unsaved": stats.unsaved,
        **{f"stream/behind/{name}": batches for name, batches in stats.behind.items()},
        **{f"stream/waited_s/{name}": seconds for name, seconds in stats.waited_s.items()},
        **({} if stats.pool.mfu is None else {"teacher/mfu": stats.pool.mfu}),
    }
    return Point(FAMILY, max((student.batch for student in students.values()), default=0), metrics)
