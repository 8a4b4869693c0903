"""Where the parts of a running family post what they do, and the driver reads it: for the display and for MLflow."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

# In place of a student: what is measured of the family as a whole.
FAMILY = ""

# What a student does that has no rank running: at first, and after its ranks have died.
NO_PLACE = "waiting for a place"
STARTING_AGAIN = "starting again"


def has_no_rank(phase: str) -> bool:
    """Whether a student in this phase has no rank running."""
    return phase == NO_PLACE or phase.startswith(STARTING_AGAIN)


@dataclass(frozen=True)
class Point:
    """Metrics of one student after one batch, or of the family.

    Attributes:
        student: its name, or ``FAMILY``.
        batch: batches consumed so far; of the family, by the student that is ahead.
        metrics: names to values; ``loss``, ``kl`` and ``cross_entropy`` are nats per loss token.
        at: when it was measured, in seconds since 1970.
    """

    student: str
    batch: int
    metrics: dict[str, float]
    at: float = field(default_factory=time.time)


class Board:
    """A Ray actor: an append-only list of points, what each student is doing, and why the run must stop, if it must."""

    def __init__(self) -> None:
        self._points: list[Point] = []
        self._phases: dict[str, str] = {}
        self._stop = ""

    def post(self, point: Point) -> None:
        """Add a point."""
        self._points.append(point)

    def phase(self, student: str, phase: str) -> None:
        """Say what a student is doing now, in a word or two."""
        self._phases[student] = phase

    def stop(self, reason: str) -> None:
        """Say that the whole run cannot go on: no restart of a student would end otherwise."""
        self._stop = self._stop or reason

    def since(self, cursor: int) -> tuple[list[Point], dict[str, str], str]:
        """Points from ``cursor`` on, every student's phase, and why the run must stop, empty when it need not."""
        return self._points[cursor:], dict(self._phases), self._stop
