"""How far a run has come: one line that changes on a terminal, a line now and then in a pipe, both on stderr."""

from __future__ import annotations

from rich.console import Console
from rich.live import Live
from rich.text import Text

from serving.bench.run import Progress

PLAIN_INTERVAL_S = 10.0


class ProgressLine:
    """Shows :class:`~serving.bench.run.Progress`; on a terminal nothing of it is left at the end."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = Console(stderr=True, markup=False, emoji=False) if console is None else console
        self._live: Live | None = None
        self._shown_s = 0.0

    def __enter__(self) -> ProgressLine:
        if self._console.is_terminal:
            # Drawn when there is news: a thread that draws by itself would take the generator's time.
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, progress: Progress) -> None:
        """Show it, in a pipe every ten seconds only."""
        if self._live is not None:
            self._live.update(Text(line(progress), overflow="ellipsis", no_wrap=True), refresh=True)
        elif progress.seconds - self._shown_s >= PLAIN_INTERVAL_S:
            self._shown_s = progress.seconds
            self._console.print(line(progress), markup=False, highlight=False, soft_wrap=True)


def line(progress: Progress) -> str:
    """The progress in a line of text."""
    of = "" if progress.total is None else f" of {progress.total}"
    until = "" if progress.duration_s is None else f" of {progress.duration_s:g}"
    under_way = progress.sent - progress.done
    return (
        f"{progress.seconds:.0f}{until} s: {progress.sent}{of} requests sent, {under_way} under way, "
        f"{progress.errors} failed"
    )
