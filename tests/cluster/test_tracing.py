"""Traces within one process; how they go through a family is tested where one runs."""

import os
import time
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cluster import tracing

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """All that this process sends, before it is sent."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)  # others' tests send a part of what they trace
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    tracing._provider.cache_clear()
    provider: TracerProvider = tracing._provider()
    kept = InMemorySpanExporter()
    # In place of what would send them.
    provider._active_span_processor._span_processors = (SimpleSpanProcessor(kept),)
    yield kept
    tracing._provider.cache_clear()


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in tracing.ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    tracing._provider.cache_clear()
    yield
    tracing._provider.cache_clear()


def ids(spans: InMemorySpanExporter) -> dict[str, tuple[int, int | None]]:
    """By name: the trace, and the span that it is part of."""
    found = {}
    for each in spans.get_finished_spans():
        assert each.context is not None
        found[each.name] = (each.context.trace_id, each.parent.span_id if each.parent else None)
    return found


def test_without_an_endpoint_there_is_no_trace(nowhere: None) -> None:
    with tracing.trace("request", CALLER), tracing.span("part"):
        assert tracing.carried() == ""
    tracing.record("late", CALLER, 1)
    tracing.flush()


def test_a_caller_s_trace_goes_on_through_what_is_carried(spans: InMemorySpanExporter) -> None:
    with tracing.trace("request", CALLER, arm="a"):
        carried = tracing.carried()
        with tracing.span("part"):
            pass
    with tracing.span("elsewhere", carried):
        pass
    tracing.record("late", carried, 1)
    by_name = ids(spans)
    _, trace, parent, _ = carried.split("-")
    assert {each[0] for each in by_name.values()} == {int(trace, 16)} == {0x0AF7651916CD43DD8448EB211C80319C}
    assert by_name["request"][1] == 0xB7AD6B7169203331
    assert {by_name[name][1] for name in ("part", "elsewhere", "late")} == {int(parent, 16)}
    late = next(span for span in spans.get_finished_spans() if span.name == "late")
    assert late.start_time == 1


def test_a_part_of_no_trace_is_not_recorded(spans: InMemorySpanExporter) -> None:
    with tracing.span("part"), tracing.span("elsewhere", ""):
        pass
    tracing.record("late", "", 1)
    assert spans.get_finished_spans() == ()


def test_traces_of_the_same_are_one_and_others_are_others(spans: InMemorySpanExporter) -> None:
    for name, of in (("once", "run 1"), ("again", "run 1"), ("other", "run 2"), ("any", ""), ("more", "")):
        with tracing.trace(name, of=of):
            pass
    by_name = ids(spans)
    assert {each[1] for each in by_name.values()} == {None}
    assert by_name["once"][0] == by_name["again"][0]
    assert len({each[0] for each in by_name.values()}) == 4


def test_a_caller_s_word_counts_for_whether_its_request_is_traced(spans: InMemorySpanExporter) -> None:
    with tracing.trace("request", f"{CALLER[:-2]}00"):
        with tracing.span("part"):
            pass
        carried = tracing.carried()
    with tracing.span("elsewhere", carried):
        pass
    assert carried.endswith("-00")
    assert spans.get_finished_spans() == ()


@pytest.mark.parametrize("nonsense", ["", "hello", "00-0-0-01", f"{CALLER}-x", "ff" + CALLER[2:]])
def test_nonsense_begins_a_trace_of_its_own(nonsense: str, spans: InMemorySpanExporter) -> None:
    with tracing.trace("request", nonsense):
        pass
    assert ids(spans)["request"][1] is None


def test_what_takes_the_spans_may_be_away(nowhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(tracing, "FLUSH_S", 0.1)
    with tracing.trace("request"):
        tracing.add(arm="a")
    began = time.monotonic()
    tracing.flush()
    assert time.monotonic() - began < 5.0
    tracing._provider().shutdown()


def test_what_is_learnt_on_the_way_is_said_of_the_present_span(spans: InMemorySpanExporter) -> None:
    tracing.add(lost=1)
    with tracing.trace("request", model="m"):
        tracing.add(arm="a", status=200)
    (request,) = spans.get_finished_spans()
    assert dict(request.attributes or {}) == {"model": "m", "arm": "a", "status": 200}
