"""Reads the board and the stream while a family runs, and shows in one snapshot where it stands."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError

from cluster.board import FAMILY, STARTING, WAITING, News, Point
from cluster.errors import RunError, first_line
from cluster.session import ACTOR_LOST
from cluster.stream.figures import StreamStats

log = logging.getLogger(__name__)

T = TypeVar("T")

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
        if (pool := self.stats.pool).restarts and not pool.ready:
            return f"the teacher is being started again ({pool.restarts} restarts): {pool.last_error}"
        if self.stats.unsaved > UNSAVED_SHOWN:
            return f"{self.stats.unsaved} batches wait for the label store to take them"
        if self.stats.blocked_by:
            return f"the teacher waits for {self.stats.blocked_by}"
        if self.stats.waiting:
            return f"{', '.join(self.stats.waiting)} wait{'s' * (len(self.stats.waiting) == 1)} for the teacher"
        return ""


class _Source:
    """An actor that is asked again and again, and may be away for a while: it is started again when it dies.

    Args:
        name: what it is, for the error.
        longest_s: seconds without an answer after which the run cannot continue.
    """

    def __init__(self, name: str, longest_s: float) -> None:
        self._name, self._longest_s, self._answered_at = name, longest_s, time.monotonic()

    def ask(self, call: Callable[[], ray.ObjectRef[T]]) -> T | None:
        """Its answer; none while it is away.

        Raises:
            RunError: it has been away for too long.
        """
        try:
            answer: T = ray.get(call(), timeout=ANSWER_S)
        except (*ACTOR_LOST, GetTimeoutError) as error:
            away_s = time.monotonic() - self._answered_at
            if away_s > self._longest_s:
                raise RunError(
                    f"the {self._name} has not answered for {away_s:.0f} s: {first_line(error)}; resume with --resume"
                ) from error
            return None
        self._answered_at = time.monotonic()
        return answer


class Watch:
    """Collects the points of a run, those of its earlier sessions included.

    Args:
        patience_s: how long a full disk is waited for.

    Attributes:
        points: by student, and under ``FAMILY`` those of the family, in the order in which they were posted.
    """

    def __init__(self, stream: ActorHandle, board: ActorHandle, students: list[str], patience_s: float) -> None:
        self._stream, self._board, self._students = stream, board, students
        self._of_stream = _Source("stream", patience_s + AWAY_S)
        self._of_board = _Source("board", patience_s + AWAY_S)
        self._family_at = float("-inf")
        self._seen: list[Point] = []
        # The board's process that ``_seen`` counts the points of; none before its first answer.
        self._process = ""
        self.points: dict[str, list[Point]] = {name: [] for name in (FAMILY, *students)}
        self._phases: dict[str, str] = {}
        self._stats: StreamStats | None = None

    def look(self, phase: str, ask_stream: bool = True, unplaced: Collection[str] = ()) -> Status:
        """The present status. Every few seconds a point of the family is posted too.

        Args:
            unplaced: students that the cluster has no room for now.
            ask_stream: False once the stream has ended; its last figures are shown then.

        Raises:
            RunError: a part of the run has reported that the whole cannot continue, and why, or the stream or the board
                is gone for good.
        """
        news = self._of_board.ask(lambda: self._board.since.remote(len(self._seen)))
        if news is not None:
            self._take(news)
        fresh = self._of_stream.ask(self._stream.stats.remote) if ask_stream else None
        self._stats = fresh or self._stats
        stats, students = self._stats, {}
        for name in self._students:
            last = self.points[name][-1] if self.points[name] else Point(name, 0, {})
            waited_s = stats.waited_s.get(name, 0.0) if stats else 0.0
            doing = self._phases.get(name, STARTING)
            if doing == STARTING and name in unplaced:
                doing = WAITING
            students[name] = StudentStatus(doing, last.batch, last.metrics, waited_s)
        if fresh is not None and time.monotonic() - self._family_at >= FAMILY_EVERY_S:
            self._family_at = time.monotonic()
            self._board.post.remote(family_point(students, fresh))
        return Status(phase, students, stats)

    def _take(self, news: News) -> None:
        if news.process != self._process:
            restarted, self._process = bool(self._process), news.process
            if restarted:
                # It may lack points that were not written, and have others in their place: counts do not tell.
                log.warning("the board was restarted and gets back the %d points that were read", len(self._seen))
                self._board.put_back.remote(self._seen)
                return
        self._seen += news.points
        for point in news.points:
            # Of a student that the spec had in an earlier session only.
            self.points.setdefault(point.student, []).append(point)
        self._phases = news.phases
        if news.stop:
            raise RunError(news.stop)

    @property
    def curves(self) -> list[Point]:
        """Every student's curve over the whole run, in order; of a batch that was learnt again the last point."""
        last = {(name, point.batch): point for name in self._students for point in self.points[name]}
        return sorted(last.values(), key=lambda point: (self._students.index(point.student), point.batch))


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
