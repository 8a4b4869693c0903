"""The load generator against a real HTTP server whose answers, delays and failures are known."""

import asyncio
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from rich.console import Console

from cluster.errors import RunError, UserError
from serving.bench import ARM_HEADER, Sample, run_bench, summarise

FIRST_S, REST_S = 0.05, 0.1


class Server:
    """Speaks enough of the API. The model's name decides how it answers; ``seen`` are the requests, in order."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.running = self.most_running = 0
        self.models = ["split", "good"]
        app = FastAPI()
        app.get("/v1/models")(self.list_models)
        app.post("/v1/chat/completions")(self.chat)
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    async def list_models(self) -> dict[str, Any]:
        return {"data": [{"id": name} for name in self.models]}

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        assert body["stream"] and body["stream_options"] == {"include_usage": True} and body["temperature"] == 0
        model = body["model"]
        self.seen.append((model, body["messages"][0]["content"]))
        if model == "busy" or (model == "flaky" and len(self.seen) % 2):
            return JSONResponse({"error": {"message": "full"}}, 503, {ARM_HEADER: "flaky"})
        headers = {} if model == "plain" else {ARM_HEADER: "arm-of-" + model}
        return StreamingResponse(self.events(model), media_type="text/event-stream", headers=headers)

    async def events(self, model: str) -> AsyncIterator[bytes]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)

        def event(body: dict[str, Any]) -> bytes:
            return f"data: {json.dumps(body, ensure_ascii=False)}\r\n\r\n".encode()

        yield event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        await asyncio.sleep(FIRST_S)
        # Cut in the middle of an event, and with a line separator that JSON allows and splitlines() breaks at.
        text = event({"choices": [{"delta": {"content": "a\u2028b"}, "finish_reason": None}]})
        yield text[:30]
        yield text[30:]
        if model == "broken":
            yield event({"error": {"message": "arm failed"}})
            return
        await asyncio.sleep(REST_S)
        yield event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        if model != "uncounted":
            yield event({"choices": [], "usage": {"completion_tokens": 7}})
        if model != "cut":
            yield b"data: [DONE]\r\n\r\n"
        self.running -= 1


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


def test_times_counts_and_concurrency(server: Server) -> None:
    result = run_bench(server.url, requests=6, concurrency=3, max_tokens=9, prompts=["p", "q"])
    (arm,) = result.arms
    assert (arm.arm, arm.count, arm.errors, result.errors) == ("arm-of-split", 6, 0, {})
    # Never below the server's own delay; above it only by what a busy machine adds.
    assert FIRST_S * 1000 <= arm.first_token_ms["p50"] < FIRST_S * 1000 + 500
    assert (FIRST_S + REST_S) * 1000 <= arm.latency_ms["p50"] < (FIRST_S + REST_S) * 1000 + 500
    assert arm.first_token_ms["p99"] < arm.latency_ms["p50"]
    assert arm.tokens_per_s < 7 / (FIRST_S + REST_S)
    assert server.most_running == 3
    assert result.seconds >= 2 * (FIRST_S + REST_S)
    assert result.tokens_per_s == pytest.approx(6 * 7 / result.seconds)
    # One warm-up for each model listed, uncounted; then the prompts in turn.
    assert server.seen[:2] == [("split", "p"), ("good", "p")]
    assert sorted(server.seen[2:]) == [("split", "p")] * 3 + [("split", "q")] * 3


def test_each_model_gets_each_prompt_in_turn(server: Server) -> None:
    result = run_bench(server.url, requests=3, concurrency=1, max_tokens=9, prompts=["p", "q"], models=["x", "plain"])
    assert server.seen[2:] == [("x", "p"), ("plain", "p"), ("x", "q"), ("plain", "q"), ("x", "p"), ("plain", "p")]
    assert [(arm.arm, arm.count) for arm in result.arms] == [("arm-of-x", 3), ("plain", 3)]


def test_failures_are_counted_and_named(server: Server) -> None:
    models = ["good", "broken", "cut", "uncounted", "busy"]
    result = run_bench(server.url, requests=2, concurrency=2, max_tokens=9, prompts=["p"], models=models)
    assert {arm.arm: (arm.count, arm.errors) for arm in result.arms} == {
        "arm-of-good": (2, 0),
        "arm-of-broken": (0, 2),
        "arm-of-cut": (0, 2),
        "arm-of-uncounted": (0, 2),
        "flaky": (0, 2),
    }
    assert result.errors == {
        "arm-of-broken: arm failed": 2,
        "arm-of-cut: stream broke off before [DONE]": 2,
        "arm-of-uncounted: stream without text or without usage": 2,
        "flaky: 503 full": 2,
    }


def test_nothing_answered_is_an_error(server: Server) -> None:
    with pytest.raises(RunError, match=r"none of 3 requests .* was answered; 3 times flaky: 503 full"):
        run_bench(server.url, requests=3, concurrency=1, max_tokens=9, prompts=["p"], models=["busy"])


def test_nobody_there(server: Server) -> None:
    server.stop()
    with pytest.raises(RunError, match=r"/v1/models gave no list of models \(ConnectError"):
        run_bench(server.url, requests=1, concurrency=1, max_tokens=9, prompts=["p"])


def test_no_models_there(server: Server) -> None:
    server.models = []
    with pytest.raises(RunError, match="lists no models"):
        run_bench(server.url, requests=1, concurrency=1, max_tokens=9, prompts=["p"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"requests": 0}, "requests is 0; allowed: 1 or more"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"prompts": []}, "no prompts"),
        ({"models": []}, "empty list of models"),
        ({"url": "localhost:8000"}, "not an HTTP URL"),
        ({"url": "http://"}, "not an HTTP URL"),
        ({"url": "http://[::1"}, "is not a URL"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], says: str) -> None:
    arguments: dict[str, Any] = {"url": "http://127.0.0.1:9", "requests": 1, "concurrency": 1, "max_tokens": 1}
    with pytest.raises(UserError, match=says):
        run_bench(**{**arguments, "prompts": ["p"], **change})


def test_quantiles_are_over_answers_only() -> None:
    samples = [Sample("a", float(i), float(10 * i), 5) for i in range(101)]
    samples += [Sample("a", error="broken"), Sample("b", error="broken")]
    result = summarise("http://x", 1, 8, 10.0, samples)
    a, b = result.arms
    assert a.first_token_ms == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert a.latency_ms == {"p50": 500.0, "p95": 950.0, "p99": 990.0}
    assert (a.count, a.errors) == (101, 1)
    assert a.tokens_per_s == pytest.approx(101 * 5 / (sum(range(101)) * 10 / 1000))
    assert (b.count, b.errors, b.first_token_ms, b.tokens_per_s) == (0, 1, {}, 0.0)
    assert result.tokens_per_s == 50.5


def test_both_renderings_say_the_same() -> None:
    samples = [Sample("small", 12.4, 1234.5, 10), Sample("large", error="503 full")]
    result = summarise("http://x", 2, 8, 1.0, samples)
    assert json.loads(json.dumps(result.as_dict()))["arms"][1] == {
        "arm": "small",
        "count": 1,
        "errors": 0,
        "first_token_ms": {"p50": 12.4, "p95": 12.4, "p99": 12.4},
        "latency_ms": {"p50": 1234.5, "p95": 1234.5, "p99": 1234.5},
        "tokens_per_s": pytest.approx(10 / 1.2345),
    }
    console = Console(file=io.StringIO(), width=80)
    console.print(result.table())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "12/12/12" in shown and "1234/1234/1234" in shown
    assert "1 times large: 503 full" in shown
    assert "…" not in shown  # an 80-column terminal shows it whole
