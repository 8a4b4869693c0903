"""The door's side: connections to arms' processes, kept open between requests."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator
from typing import Any, cast

from serving.asking import Ask, Item
from serving.link.frames import BUSY, END, FAILED, Frames, WireError, ask_out, items_in, packed

_CONNECT_S = 3.0


class LostError(Exception):
    """The process is gone, or was never there; ``begun`` says whether it had the request."""

    def __init__(self, message: str, begun: bool) -> None:
        super().__init__(message)
        self.begun = begun


class BusyError(Exception):
    """The arm's queue is full."""


class FailedError(Exception):
    """The engine failed over this request, or over all of them; the arm's log says why."""


class Pool:
    """Asks arms' processes.

    Args:
        secret: what they want to hear first.
    """

    def __init__(self, secret: str) -> None:
        self._secret = secret
        self._idle: defaultdict[str, list[_Wire]] = defaultdict(list)
        self._busy: defaultdict[str, set[_Wire]] = defaultdict(set)

    def under_way(self, address: str) -> int:
        """Requests of ours that this process has."""
        return len(self._busy[address])

    async def answer(self, address: str, ask: Ask) -> AsyncGenerator[list[Item], None]:
        """What a process answers. Closing the generator closes the connection, and so ends the generation.

        Raises:
            LostError, BusyError, FailedError: see each.
        """
        wire = await self._wire(address)
        self._busy[address].add(wire)
        whole = False
        try:
            wire.send(ask_out(ask))
            while True:
                frame = await wire.frame()
                if not isinstance(frame, str):
                    yield items_in(frame)
                    continue
                whole = True
                if frame == END:
                    return
                raise BusyError(address) if frame == BUSY else FailedError(address) if frame == FAILED else WireError
        finally:
            self._busy[address].discard(wire)
            if whole and wire.is_open:
                self._idle[address].append(wire)
            else:
                wire.abort()

    def forget(self, address: str) -> None:
        """Give up a process: what it has of ours is lost."""
        for wire in [*self._idle.pop(address, []), *self._busy.get(address, ())]:
            wire.abort()

    def close(self) -> None:
        """Give up all."""
        for address in [*self._idle, *self._busy]:
            self.forget(address)

    async def _wire(self, address: str) -> _Wire:
        while idle := self._idle[address]:
            if (wire := idle.pop()).is_open:
                return wire
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_S):
                _, wire = await loop.create_connection(_Wire, host, int(port))
        except (OSError, TimeoutError) as error:
            raise LostError(f"{address} takes no connection ({error})", begun=False) from error
        wire.send(self._secret)
        return wire


class _Wire(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self._frames = Frames()
        self._come: asyncio.Queue[Any] = asyncio.Queue()
        self.is_open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not checked: uvloop's transports are none of asyncio's classes.
        self._transport = cast(asyncio.Transport, transport)

    def send(self, content: Any) -> None:
        """Send a frame."""
        self._transport.write(packed(content))

    async def frame(self) -> Any:
        """The next frame.

        Raises:
            LostError: the connection has ended.
        """
        frame = await self._come.get()
        if isinstance(frame, LostError):
            raise frame
        return frame

    def abort(self) -> None:
        """Close it now."""
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._frames.feed(data):
                self._come.put_nowait(frame)
        except WireError:
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        self._come.put_nowait(LostError("the connection has ended", begun=True))
