"""From an engine's thread to the coroutine that reads an answer."""

import asyncio
from collections.abc import AsyncGenerator

from serving.engines.base import Delta


class Mailbox:
    """Brings one request's deltas, or the error it failed with, to the event loop it was made in."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Delta | Exception] = asyncio.Queue()

    def put(self, item: Delta | Exception) -> bool:
        """Called in any thread. False: the reader's loop is closed, so nobody will ever read."""
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:
            return False
        return True

    async def read(self) -> AsyncGenerator[Delta, None]:
        """The deltas up to the one with a ``finish_reason``; raises the error when one comes."""
        while True:
            item = await self._items.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if item.finish_reason is not None:
                return
