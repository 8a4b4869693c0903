"""What a person sees. The terminal is Stillhouse's own; everything that libraries print goes into a log file."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TextIO, cast

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.space import DISK_FULL
from cluster.stream.figures import StreamStats
from cluster.teacher.figures import PoolStats
from cluster.watch import Status
from jobs.tables import PIPE_WIDTH, plain_console

PLAIN_INTERVAL_S = 10.0


class _LogStream(io.TextIOWrapper):
    """What ``sys.stdout`` and ``sys.stderr`` are while their descriptors lead into a log.

    A disk without room for the log costs lines of it and does not end the process: the run waits for room elsewhere.
    """

    def __init__(self, descriptor: int) -> None:
        raw = open(descriptor, "wb", buffering=0, closefd=False)  # noqa: SIM115  it is closed with this stream
        super().__init__(cast(IO[bytes], raw), encoding="utf-8", errors="backslashreplace", write_through=True)

    def write(self, text: str) -> int:
        """Write it, as far as there is room."""
        with _room_or_not():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Nothing is kept back."""
        with _room_or_not():
            super().flush()


@contextlib.contextmanager
def _room_or_not() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[Console]:
    """A console on the real terminal, while file descriptors 1 and 2 lead into ``log``.

    At the level of descriptors, because C++ code and child processes write to them directly.
    """
    before = sys.stdout, sys.stderr
    for stream in before:
        stream.flush()
    saved = os.dup(1), os.dup(2)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = _LogStream(1), _LogStream(2)
    try:
        with os.fdopen(os.dup(saved[0]), "w", encoding="utf-8") as terminal:
            # A pipe has no width of its own; the result table needs this much.
            yield plain_console(file=terminal, soft_wrap=True, width=None if terminal.isatty() else PIPE_WIDTH)
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            _empty(stream)
        for descriptor, original in zip((1, 2), saved, strict=True):
            os.dup2(original, descriptor)
            os.close(original)


def _empty(stream: TextIO) -> None:
    """Write what a stream has kept back for the log; where that has no room, drop it, or the terminal would get it."""
    try:
        stream.flush()
    except OSError:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
        stream.flush()


class Display:
    """Shows where a family stands: one live table on a terminal, a line every few seconds in a pipe."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._started = time.monotonic()
        self._last_line = ("", float("-inf"))

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            # What is printed to sys.stdout belongs into the log: rich would bring it back above the display.
            self._live = Live(
                console=self._console,
                refresh_per_second=4,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, status: Status) -> None:
        """Show the present status."""
        if self._live is not None:
            self._live.update(self._table(status))
            return
        phase, shown = self._last_line
        if status.phase != phase or time.monotonic() - shown >= PLAIN_INTERVAL_S:
            self._last_line = (status.phase, time.monotonic())
            self._console.print(self._line(status), highlight=False)

    def _elapsed(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        return f"{minutes:d}:{seconds:02d}"

    def _line(self, status: Status) -> str:
        parts = [f"[{self._elapsed()}] {_doing(status)}"]
        if status.stats is not None:
            kept = f" ({len(status.stats.read)} from the store)" if status.stats.read else ""
            parts.append(f"labels {_labelled(status.stats)}/{status.stats.total}{kept}")
            if status.stats.pool.elastic:
                parts.append(_replicas(status.stats.pool))
            for name, student in status.students.items():
                figures = ""
                if student.metrics:
                    figures = " loss {loss:.2f}, KL {kl:.2f}, {tokens_per_second:.0f} tok/s".format(**student.metrics)
                parts.append(f"{name} {student.phase} {student.batch}/{status.stats.total}{figures}")
            if status.waits:
                parts.append(status.waits)
        return " | ".join(parts)

    def _table(self, status: Status) -> Any:
        head = Text(f"{self._elapsed()}  {_doing(status)}", style="bold")
        if status.stats is None:
            return head
        table = Table(box=None, pad_edge=False)
        for column in ("", "batches", "", "loss", "KL", "tok/s", "waited", "doing"):
            table.add_column(column, justify="left" if column in ("", "doing") else "right")
        total = status.stats.total
        pool = status.stats.pool
        doing = f"{_replicas(pool)}, window {status.stats.window_used}"
        doing += f", {len(status.stats.read)} batches from the store" if status.stats.read else ""
        made = _labelled(status.stats)
        table.add_row("teacher", f"{made}/{total}", ProgressBar(total, made, width=24), "", "", "", "", doing)
        for name, student in status.students.items():
            figures = [f"{student.metrics[key]:.3g}" for key in ("loss", "kl")] if student.metrics else ["", ""]
            rate = f"{student.metrics['tokens_per_second']:.0f}" if student.metrics else ""
            bar = ProgressBar(total, student.batch, width=24)
            waited = f"{student.waited_s:.0f} s"
            table.add_row(name, f"{student.batch}/{total}", bar, *figures, rate, waited, student.phase)
        return Group(head, table, Text(status.waits, style="dim"))


def _labelled(stats: StreamStats) -> int:
    """Batches that have labels, whether the teacher scored them or the store had them."""
    return len({*stats.scored, *stats.read})


def _doing(status: Status) -> str:
    return f"{status.phase}, {status.more}" if status.more else status.phase


def _replicas(pool: PoolStats) -> str:
    """How many replicas serve, and how an elastic pool came to that."""
    shown = f"{pool.ready} replica{'s' * (pool.ready != 1)} ready"
    shown += ", one more starting" if pool.growing else ""
    changes = {"added": pool.grown, "let go": pool.shrunk, "lost": pool.lost}
    told = ", ".join(f"{count} {change}" for change, count in changes.items() if count)
    return f"{shown} ({told})" if told else shown
