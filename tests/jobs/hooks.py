"""A webhook's receiver on loopback: a real HTTP server that keeps what it was told."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Receiver:
    """What came, and what is answered.

    Attributes:
        answers: statuses by the number of the request; the last one for all that follow.
        location: where a redirect leads.
        hold: set by default; while it is not, nothing is answered.
    """

    url: str
    answers: Sequence[int]
    location: str = ""
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    hold: threading.Event = field(default_factory=threading.Event)

    def told(self) -> list[dict[str, Any]]:
        """The documents."""
        return [json.loads(body) for body in self.bodies]

    def signed_by(self, secret: str, number: int = 0) -> bool:
        """Whether a request holds the signature that a receiver makes of it from the secret."""
        headers = self.headers[number]
        message = headers["X-Stillhouse-Timestamp"].encode() + b"." + self.bodies[number]
        expected = hmac.new(secret.encode(), message, hashlib.sha256).hexdigest()
        return hmac.compare_digest(headers["X-Stillhouse-Signature"], f"sha256={expected}")


@contextlib.contextmanager
def receiver(*answers: int, location: str = "") -> Iterator[Receiver]:
    """A receiver for the time of the ``with`` block; answers 204 unless told otherwise."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            found.headers.append(dict(self.headers))
            found.hold.wait()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it did not wait for us
                self.send_response(found.answers[min(len(found.bodies), len(found.answers)) - 1])
                if found.location:
                    self.send_header("Location", found.location)
                self.send_header("Content-Length", "0")
                self.end_headers()

        def do_GET(self) -> None:
            found.bodies.append(b"GET")
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Receiver(f"http://127.0.0.1:{server.server_port}/hooks/path-token", answers or (204,), location)
    found.hold.set()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield found
    finally:
        found.hold.set()
        server.shutdown()
        thread.join()
        server.server_close()
