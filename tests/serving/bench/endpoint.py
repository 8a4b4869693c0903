"""A real HTTP server over plain asyncio streams, so that a test decides on every byte, delay and failure."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

from serving.bench import ARM_HEADER

FIRST_S, REST_S, TOKENS = 0.05, 0.1, 7


class Endpoint:
    """Speaks enough of the API. The model's name decides how it answers, see ``_chat``.

    ``seen`` are the bodies of the requests in the order they came, ``at`` their moments by ``perf_counter()`` and
    ``headers`` what came with them. With ``freeze_at`` the whole server stands still for ``freeze_s`` at its n-th
    request, as in a garbage collection; ``frozen`` is when, in seconds since 1970.
    """

    def __init__(self, first_s: float = FIRST_S, rest_s: float = REST_S) -> None:
        self.first_s, self.rest_s = first_s, rest_s
        self.models: list[dict[str, Any]] = [
            {"id": "split", "owned_by": "stillhouse"},
            {"id": "good", "owned_by": "stillhouse"},
        ]
        self.seen: list[dict[str, Any]] = []
        self.at: list[float] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.freeze_at, self.freeze_s = 0, 0.0
        self.frozen = (0.0, 0.0)
        self.running = self.most_running = self.connections = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._connection, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def _run(self, what: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(10)

    def stop(self) -> None:
        async def close() -> None:
            self._server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        if self._thread.is_alive():
            self._run(close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                request, *lines = head.strip().split("\r\n")
                headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                await self._answer(request.split(" ")[1], headers, body, Wire(writer))
        except (asyncio.IncompleteReadError, ConnectionError, _HungUpError):
            pass
        finally:
            writer.close()

    async def _answer(self, path: str, headers: dict[str, str], body: bytes, wire: Wire) -> None:
        if path == "/v1/models":
            await wire.json(200, {"data": self.models})
            return
        asked = json.loads(body)
        self.at.append(time.perf_counter())
        self.seen.append(asked)
        self.headers.append(headers)
        self.paths.append(path)
        if len(self.seen) == self.freeze_at:
            began = time.time()
            time.sleep(self.freeze_s)
            self.frozen = (began, time.time())
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self._chat(asked, headers, wire)
        finally:
            self.running -= 1

    async def _chat(self, asked: dict[str, Any], headers: dict[str, str], wire: Wire) -> None:
        model = asked["model"]
        if (refuse := _REFUSALS.get(model)) or (model == "flaky" and len(self.seen) % 2):
            status, answer = refuse or (503, {"error": {"message": "full"}})
            await wire.json(status, answer, {ARM_HEADER: model})
            return
        if model == "echoes the key":
            await wire.json(401, {"error": {"message": f"Incorrect API key: {headers['authorization']}"}})
            return
        if model in _RAW:
            await _RAW[model](wire)
            return
        await wire.start({} if model == "plain" else {ARM_HEADER: "arm-of-" + model})
        text = asked.get("prompt") or " ".join(m["content"] for m in asked["messages"])
        usage = {"prompt_tokens": 10 + 3 * len(text.split()), "completion_tokens": TOKENS}
        await self._stream(model, usage, wire)

    async def _stream(self, model: str, usage: dict[str, int], wire: Wire) -> None:
        await wire.event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        await asyncio.sleep(self.first_s)
        if model != "empty":
            piece = {"text": "a"} if model == "completer" else {"delta": {"content": "a\u2028é"}}
            await wire.in_halves({"choices": [{**piece, "finish_reason": None}]})
        if model == "broken":
            await wire.event({"error": {"message": "arm\nfailed"}})
            await wire.end()
            return
        if model == "hangs":
            await asyncio.sleep(60)
        if model == "cut":
            wire.hang_up()
        await asyncio.sleep(self.rest_s)
        if model != "empty":
            await wire.event({"choices": [{"delta": {"content": "b"}, "finish_reason": None}]})
        if model != "nothing":
            await wire.event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        if model != "uncounted":
            await wire.event({"choices": [], "usage": usage})
        if model != "undone":
            await wire.raw(b"data: [DONE]\r\n\r\n")
        await wire.end()


class _HungUpError(Exception):
    """The server has closed the connection on purpose."""


class Wire:
    """Writes one HTTP answer."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    async def json(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        await self._head(
            status, {"content-type": "application/json", "content-length": str(len(data)), **(headers or {})}
        )
        self._writer.write(data)
        await self._writer.drain()

    async def start(self, headers: dict[str, str]) -> None:
        await self._head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked", **headers})

    async def _head(self, status: int, headers: dict[str, str]) -> None:
        lines = [f"HTTP/1.1 {status} Whatever", *(f"{name}: {value}" for name, value in headers.items())]
        self._writer.write("\r\n".join([*lines, "", ""]).encode())
        await self._writer.drain()

    async def bare(self, data: bytes) -> None:
        """Bytes without any HTTP around them."""
        self._writer.write(data)
        await self._writer.drain()

    async def raw(self, data: bytes) -> None:
        """One chunk of the body."""
        self._writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        await self._writer.drain()

    async def event(self, body: Any) -> None:
        await self.raw(f"data: {json.dumps(body, ensure_ascii=False)}\r\n\r\n".encode())

    async def in_halves(self, body: Any) -> None:
        """An event cut within its last character that is more than a byte, or else in the middle."""
        data = f"data: {json.dumps(body, ensure_ascii=False)}\r\n\r\n".encode()
        cut = max((i for i, byte in enumerate(data) if byte >= 0x80), default=len(data) // 2)
        await self.raw(data[:cut])
        await asyncio.sleep(0.005)
        await self.raw(data[cut:])

    async def end(self) -> None:
        await self.bare(b"0\r\n\r\n")

    def hang_up(self) -> None:
        self._writer.close()
        raise _HungUpError


async def _no_http(wire: Wire) -> None:
    await wire.bare(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
    wire.hang_up()


async def _says_nothing(wire: Wire) -> None:
    wire.hang_up()


async def _no_json(wire: Wire) -> None:
    await wire.start({})
    await wire.raw(b"data: {oops\n\n")
    await wire.end()


async def _no_utf8(wire: Wire) -> None:
    await wire.start({})
    await wire.raw(b'data: {"choices": "\xff"}\n\n')
    await wire.end()


async def _no_stream(wire: Wire) -> None:
    await wire.json(200, {"choices": [{"message": {"content": "all at once"}}]})


async def _no_choices(wire: Wire) -> None:
    await wire.start({})
    await wire.event({"id": 1})
    await wire.end()


_RAW: dict[str, Callable[[Wire], Awaitable[None]]] = {
    "no http": _no_http,
    "says nothing": _says_nothing,
    "no json": _no_json,
    "no utf8": _no_utf8,
    "no stream": _no_stream,
    "no choices": _no_choices,
}
_REFUSALS: dict[str, tuple[int, Any]] = {
    "busy": (503, {"error": {"message": "full"}}),
    "limited": (429, {"error": {"message": "slow down"}}),
    "proxied": (502, b"<html>Bad Gateway</html>"),
    "moved": (307, b""),
    "text error": (400, {"error": "no"}),
}
