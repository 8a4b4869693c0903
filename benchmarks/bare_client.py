"""The least that a client can be: bytes made beforehand, sent on connections that stay open, and the answer's searched.

`stillhouse bench` takes a library's HTTP client, whose share of a short request is larger than the door's; where the
door is what is measured, that share must not be in the figure.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

_OK, _DONE, _LAST_CHUNK = b"HTTP/1.1 200 ", b"data: [DONE]\n\n", b"0\r\n\r\n"


async def latencies(url: str, arrivals: Sequence[float], body: dict[str, Any], warmup: int = 20) -> list[float]:
    """Milliseconds from a request's first byte to its ``[DONE]``, each sent at its moment whatever the others do.

    Args:
        url: of the server, without a path.
        arrivals: in seconds, from 0.
        body: of every chat completion; it streams, and asks for ``max_tokens`` that the answer must have.

    Raises:
        ValueError: an answer is another one.
    """
    address = urlsplit(url)
    raw = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw
    counts = f'"completion_tokens": {body["max_tokens"]}'.encode()
    loop = asyncio.get_running_loop()
    idle: list[_Connection] = []
    took: list[float] = []

    async def one() -> float:
        if idle:
            connection = idle.pop()
        else:
            _, connection = await loop.create_connection(_Connection, address.hostname, address.port)
        begun = time.perf_counter()
        answer, ended = await connection.ask(request)
        if not answer.startswith(_OK) or counts not in answer:
            raise ValueError(f"not the answer that was asked for: {answer[:500]!r}")
        idle.append(connection)
        return (ended - begun) * 1000

    async def at(moment: float, started: float) -> None:
        await asyncio.sleep(max(0.0, started + moment - time.perf_counter()))
        took.append(await one())

    for _ in range(warmup):
        await one()
    started = time.perf_counter()
    await asyncio.gather(*(at(moment, started) for moment in arrivals))
    for connection in idle:
        connection.transport.close()
    return took


class _Connection(asyncio.Protocol):
    """One request after the other."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def ask(self, request: bytes) -> asyncio.Future[tuple[bytes, float]]:
        """The whole answer, and when ``[DONE]`` had come."""
        self._come, self._ended = b"", 0.0
        self._answer: asyncio.Future[tuple[bytes, float]] = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._come += data
        if not self._ended and _DONE in self._come:
            self._ended = time.perf_counter()
        # An answer without a stream is an error, and would never end so.
        if (self._ended and self._come.endswith((_LAST_CHUNK, _DONE))) or not self._come.startswith(_OK):
            self._answer.set_result((self._come, self._ended))

    def connection_lost(self, error: Exception | None) -> None:
        if not self._answer.done():
            self._answer.set_exception(error or ConnectionError(f"closed after {self._come[-200:]!r}"))
