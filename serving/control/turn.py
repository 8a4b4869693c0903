"""Slow actions, one after the other: whoever asks for a second one is told at once what is under way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cluster.errors import UserError

# Most of what holds a turn is over by then; who asked need not ask again.
_MOMENT_S = 2.0


class UnderWayError(UserError):
    """Something else has to end first; says what. Nothing has been started."""


class Turn:
    """A lock that says who has it."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._what, self._since = "", 0.0

    @asynccontextmanager
    async def take(self, what: str, waits: bool = False) -> AsyncIterator[None]:
        """Hold it while the block lasts.

        Args:
            what: said to others meanwhile, as a sentence without its end.
            waits: for as long as it takes, and not for a moment only.

        Raises:
            UnderWayError: another holds it.
        """
        try:
            async with asyncio.timeout(None if waits else _MOMENT_S):
                await self._lock.acquire()
        except TimeoutError:
            raise UnderWayError(
                f"{self._what}, for {time.monotonic() - self._since:.0f} s now; ask again when that is done."
            ) from None
        self._what, self._since = what, time.monotonic()
        try:
            yield
        finally:
            self._lock.release()
