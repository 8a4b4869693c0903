"""How a door reads HTTP: uvicorn's parser in C, with the bound on a request's head that it lacks."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.link.gathered import Gathered

HEAD_BYTES = 64 * 1024
"""Largest head of a request; a client that sends more is told 431 and hung up on."""
_REFUSAL = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head, self._head_bytes = True, 0
        self._ended = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin. What is answered in one go leaves in one go."""
        super().connection_made(cast(asyncio.Transport, Gathered(transport)))

    def data_received(self, data: bytes) -> None:
        """Parse what came."""
        if self.transport.is_closing():
            return
        self._ended = False
        super().data_received(data)
        # Where a message has ended in it, what came is that one's and not the next head's.
        if self._in_head and not self._ended:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self.transport.write(_REFUSAL)
                self.transport.close()

    def on_headers_complete(self) -> None:
        """The head has ended."""
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The next head begins."""
        self._in_head, self._head_bytes, self._ended = True, 0, True
        super().on_message_complete()
