"""Calls to the registry actor that are made again for as long as MLflow is away."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from cluster.errors import StillhouseError, first_line
from cluster.registry.client import PATIENCE_S, AwayError

log = logging.getLogger(__name__)

# Seconds until the second try; each later one takes twice as long, up to the longest.
FIRST_AGAIN_S, LONGEST_AGAIN_S = 1.0, 30.0
# Seconds without an answer to a call after which MLflow counts as away. A dead connection to a database may block for
# hours, and the upload of a large model takes minutes.
SILENT_S = 600.0


@dataclass
class _Call:
    """One call until it has an answer.

    Attributes:
        due: when it is to be made again, by the monotonic clock; ``since`` is when it was made last.
    """

    make: Callable[[], ray.ObjectRef]
    done: Callable[[Any], None]
    failed: Callable[[str], None]
    tries: int = 0
    due: float = 0.0
    since: float = 0.0


class Calls:
    """Makes calls for an event loop that must not block, and makes them again while MLflow is away.

    A call that MLflow refuses, or whose actor is gone for good, fails at once; one that finds MLflow away, or never
    returns, fails when :meth:`look` gives it up.

    Args:
        patience_s: seconds that MLflow may be away once nothing else is waited for.
    """

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._waiting: list[_Call] = []
        self._flying: dict[ray.ObjectRef, _Call] = {}
        # Since when MLflow has been away, by the clock and by the monotonic clock, and how it shows.
        self._away: tuple[float, float, str] | None = None
        self._idle_since: float | None = None

    @property
    def refs(self) -> list[ray.ObjectRef]:
        """Calls that are under way."""
        return list(self._flying)

    @property
    def pending(self) -> bool:
        """Whether any call has no answer yet."""
        return bool(self._waiting or self._flying)

    @property
    def trouble(self) -> str:
        """Since when MLflow is waited for, and why; empty when it answers."""
        if self._away is None or not self.pending:
            return ""
        since, _, reason = self._away
        return f"waiting for MLflow since {time.strftime('%H:%M:%S', time.localtime(since))}: {reason}"

    def ask(
        self, make: Callable[[], ray.ObjectRef], done: Callable[[Any], None], failed: Callable[[str], None]
    ) -> None:
        """Make a call.

        Args:
            make: makes it; may be called again.
            done: called with the answer.
            failed: called with the reason, in one line, when there will be no answer.
        """
        self._make(_Call(make, done, failed))

    def _make(self, call: _Call) -> None:
        call.since = time.monotonic()
        self._flying[call.make()] = call

    def take(self, ref: ray.ObjectRef) -> bool:
        """Process an answer that has come; False where it is of something else."""
        call = self._flying.pop(ref, None)
        if call is None:
            return False
        try:
            answer = ray.get(ref)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, AwayError):
                self._later(call, str(cause))
            elif isinstance(cause, StillhouseError):
                self._away = None  # a refusal is an answer
                call.failed(str(cause))
            else:
                call.failed(first_line(error))
        else:
            self._away = None
            call.done(answer)
        return True

    def take_ready(self) -> None:
        """Process all answers that have come, without waiting for others."""
        if refs := self.refs:
            for ref in ray.wait(refs, num_returns=len(refs), timeout=0)[0]:
                self.take(ref)

    def _later(self, call: _Call, reason: str) -> None:
        call.tries += 1
        call.due = time.monotonic() + min(LONGEST_AGAIN_S, FIRST_AGAIN_S * 2 ** (call.tries - 1))
        self._waiting.append(call)
        self._is_away(time.monotonic(), reason)

    def _is_away(self, since: float, reason: str) -> None:
        if self._away is None:
            self._away = time.time() - (time.monotonic() - since), since, reason
            log.warning("waiting for MLflow: %s", reason)

    def look(self, idle: bool) -> None:
        """Make the calls that are due again, or give them up when they have waited for too long.

        Args:
            idle: whether nothing is left to wait for but MLflow. Before that waiting costs nothing.
        """
        now = time.monotonic()
        oldest = min((call.since for call in self._flying.values()), default=now)
        if now - oldest > SILENT_S:
            self._is_away(oldest, "MLflow does not answer")
        self._idle_since = (self._idle_since or now) if idle else None
        if self._away is not None and self._idle_since is not None:
            waited_s = now - max(self._away[1], self._idle_since)
            if waited_s > self._patience_s:
                self._give_up(f"{self._away[2]}; it has been away for {now - self._away[1]:.0f} s")
                return
        for call in [call for call in self._waiting if call.due <= now]:
            self._waiting.remove(call)
            self._make(call)

    def _give_up(self, reason: str) -> None:
        calls, self._waiting, self._flying = [*self._waiting, *self._flying.values()], [], {}
        for call in calls:
            call.failed(reason)

    def wait(
        self, make: Callable[[], ray.ObjectRef], show: Callable[[str], None], poll_s: float = 0.5
    ) -> tuple[Any, str]:
        """Make one call and block until it has an answer, or the reason why it has none.

        Args:
            show: called with :attr:`trouble` while MLflow is away.
        """
        answers: list[tuple[Any, str]] = []
        self.ask(make, lambda answer: answers.append((answer, "")), lambda reason: answers.append((None, reason)))
        while not answers:
            self.step(poll_s)
            if trouble := self.trouble:
                show(trouble)
        return answers[0]

    def step(self, poll_s: float) -> None:
        """Wait a moment for answers and process them; nothing but MLflow is waited for."""
        for ref in wait_for(self.refs, poll_s):
            self.take(ref)
        self.look(idle=True)


def wait_for(refs: list[ray.ObjectRef], poll_s: float) -> list[ray.ObjectRef]:
    """The first of some results that is there within ``poll_s`` seconds, if any; waits as long when there is none."""
    if not refs:
        time.sleep(poll_s)
        return []
    done, _ = ray.wait(refs, num_returns=1, timeout=poll_s)
    return list(done)
