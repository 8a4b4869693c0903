"""Traces, by OpenTelemetry: of a batch from the teacher to its students, of a request from a door to its arm.

Off, unless OpenTelemetry's own variables say in a process's environment where traces go, see ``ENDPOINTS``; what else
there is to set, such as headers and the sampler, is read from its variables too. Sent as OTLP by HTTP with protobuf.

A trace goes from process to process as a W3C ``traceparent``, which is empty where there is none.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
NAME = "stillhouse"
# How long a process that ends waits for what takes its spans.
FLUSH_S = 5.0

# The id of the trace that is being begun; 0 for any.
_id: contextvars.ContextVar[int] = contextvars.ContextVar("trace", default=0)


@functools.cache
def _provider() -> Any:
    """What makes this process's spans and sends them now and then; None where they would go nowhere."""
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return None
    # Here, and not above: a laptop has no exporter.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

    class Ids(RandomIdGenerator):
        def generate_trace_id(self) -> int:
            return _id.get() or super().generate_trace_id()

    name = os.environ.get("OTEL_SERVICE_NAME") or NAME
    # Of our own, and not the process's: what Ray and MLflow trace is theirs.
    resource = Resource.create({"service.name": name, "host.name": socket.gethostname()})
    provider = TracerProvider(resource=resource, id_generator=Ids())
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def _context(traceparent: str) -> Any:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent})


@contextlib.contextmanager
def trace(name: str, parent: str = "", of: str = "", **attributes: str | float) -> Iterator[None]:
    """Begin a trace, or go on with a caller's; the time of the ``with`` block is its span.

    Args:
        of: what it is a trace of. The same words go on with the same trace, and every process and every session of a
            run says the same of whether it is taken, where the sampler goes by a ratio.
    """
    if (provider := _provider()) is None:
        yield
        return
    token = _id.set(int(hashlib.sha256(of.encode()).hexdigest()[:32], 16) if of else 0)
    try:
        with provider.get_tracer(NAME).start_as_current_span(name, _context(parent), attributes=attributes):
            yield
    finally:
        _id.reset(token)


@contextlib.contextmanager
def span(name: str, parent: str | None = None, **attributes: str | float) -> Iterator[None]:
    """A part of a trace, of the present one where no ``parent`` is given; outside of any trace nothing."""
    within, provider = carried() if parent is None else parent, _provider()
    if not within or provider is None:
        yield
        return
    with provider.get_tracer(NAME).start_as_current_span(name, _context(within), attributes=attributes):
        yield


def record(name: str, parent: str, began_ns: int, **attributes: str | float) -> None:
    """A part of a trace that ends now; ``began_ns`` is in nanoseconds since 1970."""
    if parent and (provider := _provider()) is not None:
        provider.get_tracer(NAME).start_span(name, _context(parent), attributes=attributes, start_time=began_ns).end()


def on() -> bool:
    """Whether traces go anywhere; for where even an empty ``with`` block would cost too much."""
    return _provider() is not None


def add(**attributes: str | float) -> None:
    """Say more of the present span, if there is one."""
    if _provider() is not None:
        from opentelemetry.trace import get_current_span

        get_current_span().set_attributes(attributes)


def carried() -> str:
    """The present span, for another process to go on from."""
    if _provider() is None:
        return ""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent", "")


def flush() -> None:
    """Send what has not been sent yet, before this process ends; given up where nobody takes it."""
    if (provider := _provider()) is not None:
        sending = threading.Thread(target=provider.force_flush, daemon=True)
        sending.start()
        sending.join(FLUSH_S)
