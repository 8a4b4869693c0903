"""Where the parts of a running family post what they do, and the driver reads it: for the display and for MLflow."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cluster.space import DISK_FULL

# In place of a student: what is measured of the family as a whole.
FAMILY = ""

# What a student does that has no rank running: at first, while the cluster has no room for it, after its ranks died.
STARTING, WAITING = "starting", "waiting for resources"
STARTING_AGAIN = "starting again"


def has_no_rank(phase: str) -> bool:
    """Whether a student in this phase has no rank running."""
    return phase in (STARTING, WAITING) or phase.startswith(STARTING_AGAIN)


# In the run's folder: every point of the run, one JSON object a line; and what a restarted board must know.
POINTS_FILE, STATE_FILE = "points.jsonl", "board.json"


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

    @property
    def key(self) -> tuple[str, int, float]:
        """Tells a point from all others; the same point posted twice has the same key."""
        return self.student, self.batch, self.at


@dataclass(frozen=True)
class News:
    """What the board has that its reader has not seen.

    Attributes:
        points: those after the reader's cursor.
        process: identifies the board's process. A restarted board may lack points that the old one could not write.
        phases: what every student does now.
        stop: why the run must stop; empty when it need not.
    """

    points: list[Point]
    process: str
    phases: dict[str, str]
    stop: str


class Board:
    """A Ray actor: an append-only list of points, what each student is doing, and why the run must stop, if it must.

    Points are written to the run's folder as they come, and phases beside them: a restarted board continues with both,
    and a resumed run with the points. While the disk is full they are kept in memory and written with the next point.

    Args:
        folder: the run's.
        again: whether this is a restart within a session of the run.
    """

    def __init__(self, folder: str, again: bool | None = None) -> None:
        if again is None:
            import ray

            again = ray.get_runtime_context().was_current_actor_reconstructed
        self._journal, self._state_file = Path(folder) / POINTS_FILE, Path(folder) / STATE_FILE
        self._points = list(_read(self._journal))
        self._known = {point.key for point in self._points}
        if not again:  # it is of an earlier session
            self._state_file.unlink(missing_ok=True)
        state = json.loads(self._state_file.read_bytes()) if self._state_file.exists() else {}
        self._phases: dict[str, str] = state.get("phases", {})
        self._stop: str = state.get("stop", "")
        self._process = uuid.uuid4().hex
        self._unwritten, self._out_of_order = b"", False
        # The last writer may have been killed in the middle of a line.
        if self._journal.exists() and (content := self._journal.read_bytes()) and not content.endswith(b"\n"):
            self._unwritten = b"\n"

    def post(self, point: Point) -> None:
        """Add a point. A point that is posted again, because its sender got no answer, is added once."""
        if point.key in self._known:
            return
        self._known.add(point.key)
        self._points.append(point)
        self._unwritten += _line(point)
        self._write()

    def _write(self) -> None:
        """Append what is not in the file yet, or replace a file in another order, as far as its disk has room."""
        try:
            if self._out_of_order:
                aside = self._journal.with_name(f".{POINTS_FILE}.part")
                aside.write_bytes(b"".join(map(_line, self._points)))
                aside.replace(self._journal)
                self._unwritten, self._out_of_order = b"", False
                return
            with self._journal.open("ab", buffering=0) as file:
                while self._unwritten:
                    self._unwritten = self._unwritten[file.write(self._unwritten) :]
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise

    def put_back(self, points: list[Point]) -> None:
        """Restore the reader's points, in its order, after a restart; those that the reader lacks come after them."""
        keys = {point.key for point in points}
        self._points = [*points, *(point for point in self._points if point.key not in keys)]
        self._known = {point.key for point in self._points}
        self._out_of_order = True
        self._write()

    def phase(self, student: str, phase: str) -> None:
        """Set what a student is doing now, in a word or two."""
        self._phases[student] = phase
        self._keep()

    def stop(self, reason: str) -> None:
        """Request that the whole run stops, because no restart of a student would end otherwise."""
        self._stop = self._stop or reason
        self._keep()

    def _keep(self) -> None:
        """Save the phases and the reason to stop; a full disk keeps the state of before."""
        aside = self._state_file.with_name(f".{STATE_FILE}.part")
        try:
            aside.write_text(json.dumps({"phases": self._phases, "stop": self._stop}))
            aside.replace(self._state_file)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise

    def since(self, cursor: int) -> News:
        """What there is after the first ``cursor`` points."""
        return News(self._points[cursor:], self._process, dict(self._phases), self._stop)


def _line(point: Point) -> bytes:
    return json.dumps(asdict(point)).encode() + b"\n"


def _read(journal: Path) -> Iterator[Point]:
    """Points of a journal; a line that a killed writer left half is no point."""
    if not journal.exists():
        return
    with journal.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                yield Point(**json.loads(line))
            except (ValueError, TypeError):
                continue
