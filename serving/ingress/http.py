"""The wire side of a door: bodies that arrive in time and in bounds, clients that hang up, answers as ASGI messages."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from serving.api.errors import ApiError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class ClientGone(Exception):  # noqa: N818 (it is no error, only the end of the talk)
    """The client has closed its connection; there is nobody to answer."""


async def read_body(receive: Receive, declared: str | None, most: int, timeout_s: float) -> bytes:
    """A request's whole body.

    Args:
        declared: its ``Content-Length``, if it has one.
        most: bytes that are taken; not one more is kept.
        timeout_s: in which it has to arrive.

    Raises:
        ApiError: 413 for one that is too large, 408 for one that is too slow.
        ClientGone: the client left before its end.
    """
    too_large = ApiError(
        413, f"The body is larger than {most} bytes, the most that this server takes.", code="body_too_large"
    )
    if declared is not None and declared.isdigit() and int(declared) > most:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > most:
                    raise too_large
                chunks.append(chunk)
                if not message.get("more_body"):
                    return b"".join(chunks)
    except TimeoutError as error:
        raise ApiError(408, f"The body did not arrive within {timeout_s:g} s.", code="body_timeout") from error


async def while_connected(receive: Receive, work: Awaitable[None]) -> None:
    """Do the work as long as the client is there; cancel it when the client hangs up.

    Raises:
        ClientGone: the client hung up first; the work has ended.
    """
    # The work stays in this task: one more would cost every request some turns of the loop.
    worker = asyncio.current_task()
    assert worker is not None
    at_work, is_gone = True, False

    def gone(watcher: asyncio.Task[None]) -> None:
        nonlocal is_gone
        if at_work and not watcher.cancelled():
            is_gone = True
            worker.cancel()

    watcher = asyncio.create_task(_hung_up(receive))
    watcher.add_done_callback(gone)
    try:
        await work
    except asyncio.CancelledError:
        # Somebody else may have cancelled this task as well.
        if is_gone and worker.uncancel() == 0:
            raise ClientGone from None
        raise
    finally:
        at_work = False
        watcher.cancel()


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def start(send: Send, status: int, content_type: str, headers: Mapping[str, str]) -> None:
    """The head of an answer."""
    pairs = {"content-type": content_type, **headers}
    encoded = [(name.lower().encode("latin-1"), value.encode("latin-1", "replace")) for name, value in pairs.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})


async def send_json(send: Send, status: int, body: Any, headers: Mapping[str, str]) -> None:
    """A whole answer."""
    raw = json.dumps(body, separators=(",", ":")).encode()
    await start(send, status, "application/json", {"content-length": str(len(raw)), **headers})
    await send({"type": "http.response.body", "body": raw})


async def send_error(send: Send, error: ApiError) -> None:
    """An error as the whole answer."""
    await send_json(send, error.status, error.body(), error.headers)


async def send_text(send: Send, status: int, content_type: str, text: str) -> None:
    """A whole answer that is no JSON."""
    raw = text.encode()
    await start(send, status, content_type, {"content-length": str(len(raw))})
    await send({"type": "http.response.body", "body": raw})
