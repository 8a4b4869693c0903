"""The writes of one turn of the event loop as one: a system call, and waking a reader, cost more than most of them."""

from __future__ import annotations

import asyncio
from typing import Any

# Bytes from which on what has gathered goes out at once, so that a reader who stands still is noticed.
_MOST_BYTES = 64 * 1024


class Gathered:
    """A transport whose writes go out together once the code that runs now has given way; the rest is as it was."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._pieces: list[bytes] = []
        self._size = 0

    def write(self, data: bytes) -> None:
        """Send, soon."""
        if not self._pieces:
            self._loop.call_soon(self.flush)
        self._pieces.append(data)
        self._size += len(data)
        if self._size >= _MOST_BYTES:
            self.flush()

    def flush(self) -> None:
        """Send now."""
        if self._pieces:
            data = b"".join(self._pieces)
            self._pieces, self._size = [], 0
            self._transport.write(data)

    def close(self) -> None:
        """Close once all is sent."""
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
