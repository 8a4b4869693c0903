"""An HTTP proxy on loopback that stands before an S3 server and does to requests what a bad day would."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Self

from aiohttp import ClientSession, web
from yarl import URL

# Headers that belong to one connection, not to the request.
_OF_THE_WAY = ("connection", "content-length", "expect", "keep-alive", "transfer-encoding")


class Fault(Enum):
    """What happens to one request.

    ``ERROR`` and ``SLOW_DOWN`` answer 500 and 503 before the server hears of it; ``LOST`` lets the server do it and
    then answers 500; ``STALL`` lets it wait longer than a client does; ``CUT`` ends the answer's body halfway;
    ``FLIP`` turns a bit in an object that is read, ``FLIP_SENT`` in one that is written. Listings stay as they are: S3
    has no checksum for them.
    """

    ERROR = "InternalError"
    SLOW_DOWN = "SlowDown"
    LOST = "lost"
    STALL = "stall"
    CUT = "cut"
    FLIP = "flip"
    FLIP_SENT = "flip sent"

    def suits(self, request: web.Request) -> bool:
        """Whether it could change anything for such a request."""
        if self is Fault.FLIP_SENT:
            return request.method == "PUT"
        if self in (Fault.CUT, Fault.FLIP):
            return request.method == "GET" and "list-type" not in request.query
        return True


Choice = Callable[[web.Request], Fault | None]


def in_turn(method: str, faults: Sequence[Fault | None], query: str = "") -> Choice:
    """The faults one after the other on requests of this method whose query holds ``query``; then none."""
    left = list(faults)

    def choose(request: web.Request) -> Fault | None:
        return left.pop(0) if left and request.method == method and query in request.query_string else None

    return choose


def now_and_then(share: float, seed: int) -> Choice:
    """A fault on a share of all requests, each kind as often as the next where requests suit it."""
    rng = random.Random(seed)
    left: list[Fault] = []

    def choose(request: web.Request) -> Fault | None:
        if rng.random() >= share:
            return None
        if not any(fault.suits(request) for fault in left):
            left.extend(rng.sample(list(Fault), len(Fault)))
        fault = next(fault for fault in left if fault.suits(request))
        left.remove(fault)
        return fault

    return choose


class S3Proxy:
    """The proxy, for a ``with``. Its address is ``url``; ``choose`` says what happens to each request.

    Args:
        upstream: the S3 server's URL.
        stall_s: for how long a stalled request stands still.
        port: to listen on; 0 takes a free one.

    Attributes:
        seen: method and fault of every request so far; none where there was nothing that it could have spoiled.
    """

    def __init__(self, upstream: str, stall_s: float, port: int = 0) -> None:
        self._upstream, self._stall_s, self._port = upstream, stall_s, port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.choose: Choice = lambda _: None
        self.seen: list[tuple[str, Fault | None]] = []
        self.url = ""

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        self._session = ClientSession(auto_decompress=False, skip_auto_headers=("Accept-Encoding", "Content-Type"))
        application = web.Application(client_max_size=2**30)
        application.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(application, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _stop(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        fault = self.choose(request)
        body = await request.read()
        if fault is not None and not fault.suits(request):
            fault = None
        if fault not in (Fault.CUT, Fault.FLIP):
            self.seen.append((request.method, fault))
        if fault in (Fault.ERROR, Fault.SLOW_DOWN):
            return _refusal(500 if fault is Fault.ERROR else 503, fault.value)
        if fault is Fault.STALL:
            await asyncio.sleep(self._stall_s)
            return _refusal(500, "too late")
        if fault is Fault.FLIP_SENT:
            body = _flipped(body)
        # As they came, host and all: they are signed.
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in _OF_THE_WAY]
        url = URL(self._upstream + request.raw_path, encoded=True)
        async with self._session.request(request.method, url, headers=headers, data=body or None) as answer:
            data = await answer.read()
            if fault is Fault.LOST:
                return _refusal(500, "InternalError")
            if fault in (Fault.CUT, Fault.FLIP):
                # Only what was asked for can be spoiled; that there is no such object has no body to check.
                fault = fault if answer.status == 200 and data else None
                self.seen.append((request.method, fault))
            if fault is Fault.FLIP:
                data = _flipped(data)
            return await _pass_on(request, answer.status, list(answer.headers.items()), data, fault is Fault.CUT)


_flips = itertools.count()


def _flipped(data: bytes) -> bytes:
    """The data with one bit turned, another one each time."""
    number = next(_flips)
    at = number * 7919 % len(data) if data else 0
    return data[:at] + bytes([data[at] ^ 1 << number % 8]) + data[at + 1 :] if data else data


def _refusal(status: int, code: str) -> web.Response:
    text = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>by the proxy</Message></Error>'
    return web.Response(status=status, text=text, content_type="application/xml")


async def _pass_on(
    request: web.Request, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool
) -> web.StreamResponse:
    """The server's answer; cut short it still says its whole length."""
    out = web.StreamResponse(status=status)
    length = str(len(data))
    for name, value in headers:
        if name.lower() == "content-length":
            length = value  # a HEAD's too, which has no body
        elif name.lower() not in _OF_THE_WAY:
            out.headers.add(name, value)
    out.headers["Content-Length"] = length
    await out.prepare(request)
    if cut and data:
        await out.write(data[: len(data) // 2])
        assert request.transport is not None
        request.transport.close()
        return out
    await out.write(data)
    await out.write_eof()
    return out
