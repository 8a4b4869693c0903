"""Takes traces as a collector does, by OTLP over HTTP, and keeps the spans for a test to look at."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Span:
    """A span as it was sent. ``parent`` is empty for a trace's first; times are nanoseconds since 1970."""

    trace: str
    id: str
    parent: str
    name: str
    began: int
    ended: int
    facts: dict[str, Any]
    service: str


class Sink:
    """What has come so far."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._spans: list[Span] = []

    def take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = _facts(resource.resource)["service.name"]
            for scope in resource.scope_spans:
                self._spans += [
                    Span(
                        each.trace_id.hex(),
                        each.span_id.hex(),
                        each.parent_span_id.hex(),
                        each.name,
                        each.start_time_unix_nano,
                        each.end_time_unix_nano,
                        _facts(each),
                        service,
                    )
                    for each in scope.spans
                ]

    def traces(self, of: Callable[[Span], bool]) -> dict[str, list[Span]]:
        """Whole traces with a span that is asked for, in the order of their spans' beginnings."""
        spans = sorted(self._spans, key=lambda span: span.began)
        wanted = {span.trace for span in spans if of(span)}
        return {trace: [span for span in spans if span.trace == trace] for trace in wanted}

    def await_span(self, of: Callable[[Span], bool], within_s: float = 30.0) -> None:
        """Wait for what is sent every few seconds."""
        deadline = time.monotonic() + within_s
        while not any(of(span) for span in list(self._spans)):
            assert time.monotonic() < deadline, "the span did not come"
            time.sleep(0.1)


def _facts(of: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in of.attributes}


@contextlib.contextmanager
def otlp_sink() -> Iterator[Sink]:
    """A collector on a free port of loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            sink.take(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        sink = Sink(server.server_port)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield sink
        finally:
            server.shutdown()
            thread.join()
