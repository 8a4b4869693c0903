"""Shows the log of a job while it runs, over dropped connections, until it ends."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import tenacity
from rich.live import Live
from rich.text import Text

from cluster.errors import RunError, UserError
from jobs.client import job_of, state_of
from jobs.lines import PROGRESS
from jobs.tables import plain_console

ENDED = ("succeeded", "failed", "stopped")
# Seconds without a sign of the cluster after which it is given up; the job may well continue.
PATIENCE_S = 300.0
# A connection that has been silent for so long may be a dead one: it is made anew. A run says something every 10 s.
SILENCE_S = 60.0
# Before a connection that has worked is made anew.
AGAIN_S = 0.5


def follow(client: Any, job: str, patience_s: float = PATIENCE_S) -> int:
    """Print a job's log from its beginning until it has ended. Ctrl-C leaves the job running.

    On a terminal its progress stays in one place and changes there, as that of a run on this machine does.

    Returns:
        The exit code: 0 when the job succeeded, 130 after Ctrl-C, else the job's own.

    Raises:
        RunError: the cluster has not answered for ``patience_s``.
    """
    tries = tenacity.Retrying(
        # Whatever breaks a connection: Ray, aiohttp and requests each raise their own.
        retry=tenacity.retry_if_exception(
            lambda error: isinstance(error, Exception) and not isinstance(error, UserError)
        ),
        wait=tenacity.wait_exponential_jitter(multiplier=0.5, max=10.0),
        stop=lambda state: state.idle_for >= patience_s,
    )
    try:
        with _Screen() as screen:
            shown = _Shown(screen)
            while (state := tries(_until_it_breaks, client, job, shown)) not in ENDED:
                time.sleep(AGAIN_S)
    except KeyboardInterrupt:
        say(f"\nthe job continues; follow it again with: stillhouse jobs logs {job} --follow")
        return 130
    except tenacity.RetryError as error:
        why = str(error.last_attempt.exception()).splitlines()
        raise RunError(
            f"the cluster has not answered for {patience_s:g} s ({why[0] if why else 'no reason given'}); the job may "
            f"continue; follow it again with: stillhouse jobs logs {job} --follow"
        ) from None
    info = job_of(client, job)
    say(f"{job} {state}")
    return 0 if state == "succeeded" else (info.driver_exit_code or 1)


class _Screen:
    """Where a log goes: a pipe gets it as it is; on a terminal the lines of progress take each other's place."""

    def __init__(self) -> None:
        console = plain_console()
        self._live = Live(console=console, transient=True) if console.is_terminal else None
        self._begun = ""

    def __enter__(self) -> _Screen:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def write(self, text: str) -> None:
        """Show some more of the log, which may end within a line."""
        if self._live is None:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if line.startswith(PROGRESS):
                self._live.update(Text(line.replace(" | ", "\n    ")))
            else:
                self._live.console.print(Text(line), soft_wrap=True)


class _Shown:
    """Prints a log of which each connection sends all from its beginning: what has been printed is left out."""

    def __init__(self, screen: _Screen) -> None:
        self._screen = screen
        self._printed = self._arrived = 0

    def again(self) -> None:
        """A new connection begins."""
        self._arrived = 0

    def add(self, text: str) -> bool:
        """Print what is new of what has arrived; whether there was anything."""
        new = text[max(0, self._printed - self._arrived) :]
        self._arrived += len(text)
        self._printed = max(self._printed, self._arrived)
        self._screen.write(new)
        return bool(new)


def _until_it_breaks(client: Any, job: str, shown: _Shown) -> str:
    """Print the log for as long as the connection lasts; the job's state after it.

    One that breaks after it has brought something is not a failure yet: there will be another.
    """
    worked = ended = False

    async def tail() -> None:
        nonlocal worked, ended
        chunks = aiter(client.tail_job_logs(job))
        while True:
            async with asyncio.timeout(SILENCE_S):
                text = await anext(chunks, None)
            if text is None:
                ended = True
                return
            worked |= shown.add(text)

    shown.again()
    try:
        asyncio.run(tail())
    except Exception as error:
        if not worked and not isinstance(error, TimeoutError):
            raise
    state = state_of(job_of(client, job))
    # What was said while nobody listened is still to be shown.
    return state if ended or state not in ENDED else ""


def say(text: str) -> None:
    """Print a line of our own."""
    print(text, flush=True)  # noqa: T201
