"""The arm's side: takes requests from doors that know the endpoint's secret, and sends each answer as it comes."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, cast

from cluster import tracing
from serving.asking import Ask, Item
from serving.link.frames import BUSY, END, FAILED, MOST_BYTES, Frames, WireError, ask_in, items_out, packed, shares
from serving.link.gathered import Gathered

# Bytes of the first frame, before the other side has shown who it is.
_GREETING_BYTES = 256
# Seconds between two frames of one answer: an engine that is faster has its tokens sent some at a time.
_STEP_S = 0.005
logger = logging.getLogger("ray.serve")


class Listener:
    """Listens for doors.

    Args:
        secret: what a door has to say first.
        answer: answers one request.
        most: requests that are taken in at the same time; the next is told that the queue is full.
    """

    def __init__(self, secret: str, answer: Callable[[Ask], AsyncGenerator[list[Item], None]], most: int) -> None:
        self.secret, self.answer, self.most = secret.encode(), answer, most
        self.under_way = 0
        self.is_closing = False
        self.connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None

    async def open(self, host: str) -> str:
        """Begin to listen; the address, ``host:port``."""
        self._server = await asyncio.get_running_loop().create_server(lambda: _Connection(self), host, 0)
        return f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def close(self, patience_s: float) -> None:
        """Take no more requests, and let those under way end for a while."""
        if self._server is None:
            return
        self._server.close()
        self.is_closing = True
        for connection in [*self.connections]:
            connection.close_if_idle()
        deadline = asyncio.get_running_loop().time() + patience_s
        while self.under_way and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)


class _Connection(asyncio.Protocol):
    """One request at a time; when the door closes the connection, the answer is not wanted any more."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._frames = Frames(_GREETING_BYTES)
        self._is_known = False
        self._task: asyncio.Task[None] | None = None
        self._held: list[Item] = []
        self._sent_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not checked: uvloop's transports are none of asyncio's classes.
        self._transport = Gathered(cast(asyncio.Transport, transport))
        self._listener.connections.add(self)

    def close_if_idle(self) -> None:
        """End a connection that no answer is being sent on."""
        if self._task is None or self._task.done():
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._frames.feed(data):
                self._take(frame)
        except WireError as error:
            logger.warning("a connection is closed: %s", error)
            self._transport.abort()

    def _take(self, frame: Any) -> None:
        if not self._is_known:
            if not isinstance(frame, str) or not hmac.compare_digest(frame.encode(), self._listener.secret):
                raise WireError("whoever opened it does not know the secret")
            self._is_known, self._frames.most = True, MOST_BYTES
            return
        if self._task is not None and not self._task.done():
            raise WireError("a request before the last one's answer")
        self._task = asyncio.get_running_loop().create_task(self._answer(ask_in(frame)))

    async def _answer(self, ask: Ask) -> None:
        began_ns = time.time_ns()
        if self._listener.under_way >= self._listener.most:
            self._transport.write(packed(BUSY))
            return
        self._listener.under_way += 1
        self._sent_at = 0.0  # what comes first goes at once
        last: Any = END
        try:
            async with aclosing(self._listener.answer(ask)) as answer:
                async for items in answer:
                    await self._writable.wait()
                    self._send(items)
        except Exception:
            logger.exception("a request failed")
            last = FAILED
        finally:
            tracing.record("answer", ask.trace, began_ns)
            self._listener.under_way -= 1
        self._flush()
        self._transport.write(packed(last))
        if self._listener.is_closing:
            self._transport.close()

    def _send(self, items: list[Item]) -> None:
        self._held += items
        loop = asyncio.get_running_loop()
        wait_s = self._sent_at + _STEP_S - loop.time()
        if wait_s <= 0:
            self._flush()
        elif self._timer is None:
            self._timer = loop.call_later(wait_s, self._flush)

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._held:
            for share in shares(self._held):
                self._transport.write(packed(items_out(share)))
            self._held = []
            self._sent_at = asyncio.get_running_loop().time()

    def connection_lost(self, error: Exception | None) -> None:
        self._listener.connections.discard(self)
        self._writable.set()
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()
