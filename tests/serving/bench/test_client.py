"""One request: what its times count from, what is an answer and what kind of failure everything else is."""

import asyncio
import socket
from time import perf_counter
from typing import Any

import pytest

from serving.bench import Sample, Settings
from serving.bench.client import Client
from serving.bench.workload import Job
from tests.serving.bench.endpoint import FIRST_S, REST_S, TOKENS, Endpoint


def ask(url: str, model: str, late_s: float = 0.0, prompt: Any = "a b", **settings: Any) -> Sample:
    async def once() -> Sample:
        async with Client(Settings(url, **settings)) as client:
            return await client.ask(Job(model, prompt, 9), perf_counter() - late_s)

    return asyncio.run(once())


def test_times_and_counts_of_an_answer(endpoint: Endpoint) -> None:
    sample = ask(endpoint.url, "good")
    assert (sample.arm, sample.error, sample.detail, sample.counted) == ("arm-of-good", None, "", True)
    assert (sample.prompt_tokens, sample.completion_tokens) == (16, TOKENS)
    assert sample.first_token_ms is not None and sample.latency_ms is not None
    # Never below the server's own delay; above it only by what a busy machine adds.
    assert FIRST_S * 1000 <= sample.first_token_ms < FIRST_S * 1000 + 5000
    assert (FIRST_S + REST_S) * 1000 <= sample.latency_ms < (FIRST_S + REST_S) * 1000 + 5000
    (gap,) = sample.gaps_ms  # two events with text; the role before them and the counts behind them are none
    assert REST_S * 1000 / 5 <= gap <= sample.latency_ms - sample.first_token_ms
    assert sample.per_token_ms == pytest.approx((sample.latency_ms - sample.first_token_ms) / (TOKENS - 1))
    (asked,) = endpoint.seen
    assert asked["messages"] == [{"role": "user", "content": "a b"}]
    assert asked["stream"] and asked["stream_options"] == {"include_usage": True}
    assert (asked["max_tokens"], asked["temperature"]) == (9, 0)
    assert "authorization" not in endpoint.headers[0]


def test_times_count_from_when_it_was_due(endpoint: Endpoint) -> None:
    sample = ask(endpoint.url, "good", late_s=2.0)
    assert 2000 <= sample.late_ms < 2300
    assert sample.first_token_ms is not None and sample.latency_ms is not None
    assert sample.first_token_ms >= 2000 + FIRST_S * 1000
    assert sample.latency_ms >= 2000 + (FIRST_S + REST_S) * 1000


def test_a_server_that_names_no_arm_is_its_model(endpoint: Endpoint) -> None:
    assert ask(endpoint.url, "plain").arm == "plain"


def test_the_completions_call(endpoint: Endpoint) -> None:
    sample = ask(endpoint.url, "completer", api="completions", prompt=[{"role": "user", "content": "a b"}])
    assert (endpoint.paths, sample.error) == (["/v1/completions"], None)
    assert endpoint.seen[0]["prompt"] == "a b"
    assert "messages" not in endpoint.seen[0]
    assert sample.first_token_ms is not None and sample.latency_ms is not None
    assert FIRST_S * 1000 <= sample.first_token_ms < sample.latency_ms


def test_a_chat_is_sent_as_it_is_and_a_base_with_v1_is_understood(endpoint: Endpoint) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    ask(endpoint.url + "/v1/", "good", prompt=chat)
    assert endpoint.seen[0]["messages"] == chat


def test_an_empty_answer_ends_with_its_first_token(endpoint: Endpoint) -> None:
    sample = ask(endpoint.url, "empty")
    assert sample.error is None
    assert sample.first_token_ms is not None and sample.first_token_ms >= (FIRST_S + REST_S) * 1000


def test_without_usage_the_events_are_counted(endpoint: Endpoint) -> None:
    sample = ask(endpoint.url, "uncounted")
    assert (sample.error, sample.completion_tokens, sample.counted, sample.prompt_tokens) == (None, 2, False, 0)


@pytest.mark.parametrize(
    ("model", "kind", "says", "had_text"),
    [
        ("busy", "http_503", "503 full", False),
        ("limited", "http_429", "429 slow down", False),
        ("proxied", "http_502", "502 <html>Bad Gateway</html>", False),
        ("moved", "http_307", "307", False),
        ("text error", "http_400", "400 no", False),
        ("broken", "error_event", "arm failed", True),
        ("cut", "disconnected", "", True),
        ("undone", "no_done", "the stream ended before [DONE]", True),
        ("nothing", None, "", True),
        ("no http", "unreadable", "", False),
        ("says nothing", "disconnected", "", False),
        ("no json", "unreadable", "JSONDecodeError", False),
        ("no utf8", "unreadable", "UnicodeDecodeError", False),
        ("no stream", "unreadable", "answered with JSON", False),
        ("no choices", "unreadable", "KeyError", False),
    ],
)
def test_kinds_of_failure(endpoint: Endpoint, model: str, kind: str | None, says: str, had_text: bool) -> None:
    sample = ask(endpoint.url, model)
    assert sample.error == kind
    assert says in sample.detail
    assert "\n" not in sample.detail
    assert (sample.latency_ms is None) == (kind is not None)
    assert (sample.first_token_ms is not None) == had_text


def test_a_stream_of_nothing_is_a_failure(endpoint: Endpoint) -> None:
    async def only_done(wire: Any) -> None:
        await wire.start({})
        await wire.raw(b"data: [DONE]\n\n")
        await wire.end()

    import tests.serving.bench.endpoint as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module._RAW, "only done", only_done)
        assert ask(endpoint.url, "only done").error == "empty"


def test_a_time_limit(endpoint: Endpoint) -> None:
    before = perf_counter()
    sample = ask(endpoint.url, "hangs", timeout_s=0.4)
    assert 0.4 <= perf_counter() - before < 5
    assert (sample.error, sample.latency_ms) == ("timeout", None)
    assert sample.first_token_ms is not None


def test_nobody_there() -> None:
    with socket.socket() as taken:  # bound and not listening: refuses
        taken.bind(("127.0.0.1", 0))
        sample = ask(f"http://127.0.0.1:{taken.getsockname()[1]}", "good")
    assert (sample.error, sample.arm) == ("connect", "good")


def test_too_few_file_descriptors_are_the_generators_own_failure(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: object, **__: object) -> socket.socket:
        raise OSError(24, "Too many open files")

    async def once() -> Sample:
        async with Client(Settings(endpoint.url)) as client:
            monkeypatch.setattr(socket, "socket", none_left)
            try:
                return await client.ask(Job("good", "a", 9))
            finally:
                monkeypatch.undo()

    assert asyncio.run(once()).error == "generator"


def test_the_key_is_sent_and_never_shown(endpoint: Endpoint) -> None:
    key = "sk-very-secret"
    sample = ask(endpoint.url, "echoes the key", api_key=key)
    assert endpoint.headers[0]["authorization"] == f"Bearer {key}"
    assert (sample.error, sample.detail) == ("http_401", "401 Incorrect API key: Bearer ***")
    settings = Settings(endpoint.url, api_key=key)
    assert key not in repr(settings) and key not in str(settings.as_dict())


def test_a_connection_is_used_again(endpoint: Endpoint) -> None:
    async def four() -> list[Sample]:
        async with Client(Settings(endpoint.url)) as client:
            return [await client.ask(Job("good", "a", 9)) for _ in range(4)]

    assert [sample.error for sample in asyncio.run(four())] == [None] * 4
    assert endpoint.connections == 1
