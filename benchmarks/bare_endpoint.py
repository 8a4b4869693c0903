"""The least that an endpoint can be: a socket that says the same stream to every request, at once and unread.

What a load generator measures here is its own share, and the network's. Prints its URL; ends when its stdin does.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

MODEL = "bare"
TOKENS = 16


def main() -> None:
    """Serve until stdin ends."""
    asyncio.run(serve())


async def serve() -> None:
    """Listen on any free port of loopback."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Connection, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


class Connection(asyncio.Protocol):
    """One request after the other; a head with its length, then so much body."""

    def connection_made(self, transport: Any) -> None:
        self._transport, self._come = transport, b""

    def data_received(self, data: bytes) -> None:
        self._come += data
        head, end, body = self._come.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
        if end and len(body) >= length:
            self._come = b""
            self._transport.write(_LIST if head.startswith(b"GET") else _STREAM)


def _event(choices: list[Any], **more: Any) -> str:
    body = {"id": "chatcmpl-" + "0" * 32, "object": "chat.completion.chunk", "created": 0, "model": MODEL}
    return f"data: {json.dumps({**body, 'choices': choices, **more})}\n\n"


def _http(kind: str, body: str) -> bytes:
    return f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()


_PIECES = [_event([{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]) for _ in range(TOKENS)]
_END = _event([{"index": 0, "delta": {}, "finish_reason": "length"}])
_USAGE = _event([], usage={"prompt_tokens": 70, "completion_tokens": TOKENS, "total_tokens": 70 + TOKENS})
_STREAM = _http("text/event-stream", "".join([*_PIECES, _END, _USAGE, "data: [DONE]\n\n"]))
_LIST = _http("application/json", json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]}))


if __name__ == "__main__":
    main()
