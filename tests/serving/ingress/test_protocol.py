"""A door's HTTP on a real socket: requests one after the other, and heads that have no end."""

import asyncio
from typing import Any

import pytest
import uvicorn

from serving.ingress.protocol import HEAD_BYTES, BoundedProtocol


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Tell how many bytes of body came."""
    size = 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"8")]})
    await send({"type": "http.response.body", "body": f"{size:08d}".encode()})


def talk(*parts: bytes, answered: bool = False) -> bytes:
    """What a server says to bytes sent part by part, to the end of the connection; ``answered``: one answer to each."""

    async def play() -> bytes:
        config = uvicorn.Config(
            app, port=0, http=BoundedProtocol, log_level="error", lifespan="off", timeout_keep_alive=1
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        said = b""
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
                if answered:
                    said += await reader.readuntil(b"\r\n\r\n") + await reader.readexactly(8)
            async with asyncio.timeout(3):
                while more := await reader.read(65536):
                    said += more
        except (TimeoutError, ConnectionError):
            pass
        writer.close()
        server.should_exit = True
        await serving
        return said

    return asyncio.run(play())


def request(body: bytes, padding: int = 0) -> bytes:
    head = b"POST / HTTP/1.1\r\nhost: x\r\n" + (b"x-padding: " + b"p" * padding + b"\r\n" if padding else b"")
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


def test_requests_on_one_connection_each_with_a_head_of_its_own() -> None:
    several = [request(b"a" * size, padding=HEAD_BYTES // 2) for size in (0, 5, 1_000_000)]
    said = talk(*several, answered=True)
    assert [f"{size:08d}".encode() in said for size in (0, 5, 1_000_000)] == [True] * 3
    assert said.count(b"200 OK") == 3


@pytest.mark.parametrize("step", [1000, 300_000])
def test_a_head_without_an_end_is_refused(step: int) -> None:
    flood = b"GET / HTTP/1.1\r\nhost: x\r\n" + b"".join(b"x-%d: y\r\n" % number for number in range(200_000))
    said = talk(*(flood[first : first + step] for first in range(0, len(flood), step)))
    assert said.startswith(b"HTTP/1.1 431 ") or said == b""  # a flood may not stop to hear the answer
    assert b"200 OK" not in said


def test_a_url_without_an_end_is_refused() -> None:
    said = talk(b"GET /" + b"a" * (2 * HEAD_BYTES), b" HTTP/1.1\r\nhost: x\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 4") and b"200 OK" not in said, said[:200]
