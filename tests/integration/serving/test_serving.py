"""The endpoint as its users meet it: real Ray, real Serve, two tiny arms, OpenAI's own client.

Each test leaves the folder's endpoint as it found it, but for the last ones, which end it.
"""

import http.client
import json
import math
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil  # type: ignore[import-untyped,unused-ignore]
import pytest
from ray import serve

from cluster.errors import RunError, UserError
from serving.arms import Arm, parse_arms
from serving.bench import run_bench
from serving.deploy import Endpoint, deploy, endpoint_of
from serving.ingress.relay import ARM_HEADER
from tests.integration.otlp import Sink
from tests.integration.serving.conftest import QUEUE, SLOTS
from tests.tiny import ENDLESS_POSITIONS

pytestmark = pytest.mark.integration


@pytest.fixture
def client(endpoint: Endpoint) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{endpoint.url}/v1",
        api_key="none",
        max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    ) as client:
        yield client


@pytest.fixture
def http_client(endpoint: Endpoint) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=endpoint.url, trust_env=False, timeout=60) as client:
        yield client


CHAT: list[Any] = [{"role": "user", "content": "hello"}]


def test_openai_s_client_lists_the_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["stillhouse", "small", "large"]
    assert client.models.retrieve("large").owned_by == "stillhouse"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("huge")


@pytest.mark.parametrize("arm", ["small", "large"])
def test_streamed_or_whole_a_completion_is_the_same(client: openai.OpenAI, arm: str) -> None:
    raw = client.completions.with_raw_response.create(model=arm, prompt="hello", temperature=0, max_tokens=30)
    assert raw.headers[ARM_HEADER] == arm
    whole = raw.parse()
    assert whole.model == arm
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (5, 30, 35)

    streamed = client.completions.with_raw_response.create(
        model=arm, prompt="hello", temperature=0, max_tokens=30, stream=True, stream_options={"include_usage": True}
    )
    assert streamed.headers[ARM_HEADER] == arm
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *chunks, last = list(streamed.parse())
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.choices == [] and last.usage == whole.usage
    assert len(chunks) > 10  # it came in pieces


def test_streamed_or_whole_a_chat_is_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="small", messages=CHAT, temperature=0, max_completion_tokens=20)
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len("hello") + 3  # the template's own tokens
    chunks = list(
        client.chat.completions.create(model="small", messages=CHAT, temperature=0, max_tokens=20, stream=True)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


def test_a_request_can_be_followed_from_the_caller_through_the_door_to_the_arm(
    http_client: httpx.Client, traces: Sink
) -> None:
    trace, caller = secrets.token_hex(16), secrets.token_hex(8)
    for taken in ("01", "00"):  # the caller's word counts
        headers = {"traceparent": f"00-{trace}-{caller}-{taken}"}
        body = {"model": "large", "prompt": "hello", "max_tokens": 5, "stream": True}
        assert http_client.post("/v1/completions", json=body, headers=headers).status_code == 200
    for name in ("request", "answer"):
        traces.await_span(lambda span, name=name: (span.trace, span.name) == (trace, name))
    request, answer = traces.traces(lambda span: span.trace == trace)[trace]
    assert (request.name, request.parent, answer.name, answer.parent) == ("request", caller, "answer", request.id)
    assert (request.facts, answer.facts) == ({"model": "large", "arm": "large", "status": 200}, {})
    assert request.began < answer.began < answer.ended <= request.ended


def test_the_arms_are_different_models(client: openai.OpenAI) -> None:
    texts = {
        arm: client.completions.create(model=arm, prompt="hello", temperature=0, max_tokens=20).choices[0].text
        for arm in ("small", "large")
    }
    assert texts["small"] != texts["large"]


def test_stop_and_seed_arrive_at_the_arm(client: openai.OpenAI) -> None:
    def text(**wishes: Any) -> Any:
        return client.completions.create(model="small", prompt="hello", max_tokens=30, **wishes).choices[0]

    whole = text(temperature=0).text
    stop = whole[4:7]
    stopped = text(temperature=0, stop=stop)
    assert (stopped.text, stopped.finish_reason) == (whole[: whole.index(stop)], "stop")
    assert text(seed=3).text == text(seed=3).text != text(seed=4).text


def test_several_answers_to_one_request(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="small", messages=CHAT, n=3, seed=5, max_tokens=12)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert whole.usage is not None and whole.usage.completion_tokens == 36
    streamed: dict[int, str] = {}
    for chunk in client.chat.completions.create(model="small", messages=CHAT, n=3, seed=5, max_tokens=12, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert [streamed[index] for index in range(3)] == texts


def test_log_probabilities_in_both_shapes(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="small", messages=CHAT, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    for token in chat.choices[0].logprobs.content:
        assert len(token.top_logprobs) == 3
        # Greedy: the chosen token is the likeliest.
        assert token.logprob == max(other.logprob for other in token.top_logprobs) <= 0
    plain = client.completions.create(model="small", prompt="hello", temperature=0, max_tokens=5, logprobs=2)
    shown = plain.choices[0].logprobs
    assert shown is not None and shown.tokens is not None and shown.token_logprobs is not None
    assert len(shown.tokens) == len(shown.token_logprobs) == 5
    pieces = []
    for chunk in client.completions.create(
        model="small", prompt="hello", temperature=0, max_tokens=5, logprobs=2, stream=True
    ):
        if chunk.choices[0].logprobs is not None and chunk.choices[0].logprobs.tokens:
            pieces += chunk.choices[0].logprobs.tokens
    assert pieces == shown.tokens


def test_token_ids_are_taken_as_a_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="small", prompt=[5, 6, 7], temperature=0, max_tokens=2)
    assert answer.usage is not None and answer.usage.prompt_tokens == 3
    with pytest.raises(openai.BadRequestError, match="Token id 260 is outside") as caught:
        client.completions.create(model="small", prompt=[5, 260], max_tokens=2)
    assert caught.value.response.headers[ARM_HEADER] == "small"


def arms_drawn(http_client: httpx.Client, count: int) -> Counter[str]:
    """Of so many callers, always the same ones: a caller's draw is a hash of the name."""
    body = {"model": "stillhouse", "prompt": "a", "max_tokens": 1}
    answers = (http_client.post("/v1/completions", json={**body, "user": f"caller {i}"}) for i in range(count))
    return Counter(answer.headers[ARM_HEADER] for answer in answers)


def test_traffic_is_split_by_weight(endpoint: Endpoint, http_client: httpx.Client) -> None:
    """100 draws at 1:1 and at 1:3, each within four standard deviations."""
    for weights, share in (({"small": 1, "large": 1}, 0.5), ({"large": 3}, 0.75)):
        endpoint.set_weights(weights)
        drawn = arms_drawn(http_client, 100)
        assert drawn.total() == 100
        assert abs(drawn["large"] - 100 * share) <= 4 * math.sqrt(100 * share * (1 - share))
    endpoint.set_weights({"small": 1, "large": 1})


def test_weights_change_live_and_zero_means_never(endpoint: Endpoint, http_client: httpx.Client) -> None:
    def pids() -> set[int]:
        return {process.pid for process in _actors("ray::ServeReplica")}

    before = pids()
    assert len(before) == 4  # the control, a door and two arms
    endpoint.set_weights({"small": 0})
    assert arms_drawn(http_client, 20) == {"large": 20}
    assert http_client.get("/admin/traffic").json()["weights"] == {"small": 0, "large": 1}
    # Weight 0 only takes it out of the split.
    answer = http_client.post("/v1/completions", json={"model": "small", "prompt": "a", "max_tokens": 1})
    assert answer.headers[ARM_HEADER] == "small"
    endpoint.set_weights({"small": 1, "large": 0})
    assert arms_drawn(http_client, 20) == {"small": 20}
    for wrong, says in (({"small": 0}, "all weights are 0"), ({"huge": 1}, "no arm is named 'huge'")):
        with pytest.raises(UserError, match=says):
            endpoint.set_weights(wrong)
    assert arms_drawn(http_client, 5) == {"small": 5}
    endpoint.set_weights({"small": 1, "large": 1})
    assert pids() == before  # nothing was restarted


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        ("completions", {"model": "huge", "prompt": "a"}, 404, "model", "model_not_found"),
        ("completions", {"prompt": "a"}, 400, "model", None),
        ("completions", {"model": "small"}, 400, "prompt", None),
        ("completions", {"model": "small", "prompt": "a", "temperature": 3}, 400, "temperature", None),
        ("completions", {"model": "small", "prompt": "a", "suffix": "b"}, 400, "suffix", "unsupported_parameter"),
        (
            "chat/completions",
            {"model": "small", "messages": CHAT, "tools": [{}]},
            400,
            "tools",
            "unsupported_parameter",
        ),
        (
            "completions",
            {"model": "small", "prompt": "a" * ENDLESS_POSITIONS, "max_tokens": 1},
            400,
            "prompt",
            "context_length_exceeded",
        ),
        (
            "chat/completions",
            {"model": "small", "messages": CHAT, "max_tokens": ENDLESS_POSITIONS, "stream": True},
            400,
            "messages",
            "context_length_exceeded",
        ),
    ],
)
def test_errors_have_openai_s_shape(
    http_client: httpx.Client, path: str, body: dict[str, Any], status: int, param: str, code: str | None
) -> None:
    response = http_client.post(f"/v1/{path}", json=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    # Only a request that reached an arm can name one.
    assert response.headers.get(ARM_HEADER) == ("small" if code == "context_length_exceeded" else None)


def test_unknown_paths_too(http_client: httpx.Client) -> None:
    for response in (http_client.get("/v2/models"), http_client.delete("/v1/models")):
        assert response.status_code in (404, 405)
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_full_queue_is_told_so(endpoint: Endpoint) -> None:
    """More requests than slots and queue hold: the rest gets 503 at once, and those let in are answered."""
    body = {"model": "small", "prompt": "a", "max_tokens": 300, "temperature": 0}

    def one(_: int) -> httpx.Response:
        return httpx.post(f"{endpoint.url}/v1/completions", json=body, trust_env=False, timeout=60)

    with ThreadPoolExecutor(12) as pool:
        responses = list(pool.map(one, range(12)))
    status = Counter(response.status_code for response in responses)
    assert set(status) == {200, 503}
    assert status[200] >= SLOTS + QUEUE
    refused = next(response for response in responses if response.status_code == 503)
    assert refused.json()["error"]["code"] == "overloaded"
    assert refused.headers["retry-after"] == "1"
    assert refused.headers[ARM_HEADER] == "small"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(endpoint: Endpoint, http_client: httpx.Client, stream: bool) -> None:
    """Every slot is taken by an answer of tens of thousands of tokens; the clients leave; the next is served."""
    address = httpx.URL(endpoint.url)
    body = json.dumps({"model": "small", "messages": CHAT, "temperature": 0, "stream": stream})
    connections = []
    for _ in range(SLOTS):
        connection = http.client.HTTPConnection(address.host, address.port, timeout=30)
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        if stream:
            response = connection.getresponse()
            assert response.status == 200 and response.read(2000).startswith(b"data: ")
        connections.append(connection)

    short = {"model": "small", "prompt": "a", "max_tokens": 1}
    with pytest.raises(httpx.ReadTimeout):  # the slots really are taken, once the long requests have arrived
        for _ in range(20):
            http_client.post("/v1/completions", json=short, timeout=2.0)
            time.sleep(0.5)
    for connection in connections:
        connection.close()
    assert http_client.post("/v1/completions", json=short, timeout=15).status_code == 200
    # Not only Serve's slot is free: nobody generates for those who left.
    (arm,) = _actors("ray::ServeReplica:stillhouse~small~1")
    deadline = time.monotonic() + 10
    while arm.cpu_percent(interval=0.5) > 20:
        assert time.monotonic() < deadline, "the arm is still working"


def test_the_bench_measures_each_arm(endpoint: Endpoint) -> None:
    result = run_bench(endpoint.url, 4, 2, 12, ["hello", "why"], models=["small", "large"])
    assert [(arm.arm, arm.count, arm.errors) for arm in result.arms] == [("large", 4, 0), ("small", 4, 0)]
    for arm in result.arms:
        assert 0 < arm.first_token_ms["p50"] < arm.latency_ms["p50"] <= arm.latency_ms["p99"] < 30_000
        # Tokens are the endpoint's own count: 12 each, over the time the answers took.
        assert 12_000 / arm.latency_ms["p99"] * 0.5 < arm.tokens_per_s < 12_000 / arm.first_token_ms["p50"]
    assert result.tokens_per_s == pytest.approx(8 * 12 / result.seconds)


def test_the_bench_follows_the_split(endpoint: Endpoint) -> None:
    endpoint.set_weights({"small": 0, "large": 1})
    result = run_bench(endpoint.url, 3, 1, 4, ["hello"])
    endpoint.set_weights({"small": 1, "large": 1})
    assert [(arm.arm, arm.count) for arm in result.arms] == [("large", 3)]


def test_the_bench_fails_when_nothing_answers(endpoint: Endpoint) -> None:
    with pytest.raises(RunError, match=r"none of 1 warm-up requests .* 404 The model 'huge' does not exist"):
        run_bench(endpoint.url, 2, 1, 4, ["hello"], models=["huge"])


def test_what_cannot_be_served_starts_nothing(endpoint: Endpoint, models: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="an endpoint 'stillhouse' already runs on this cluster"):
        deploy(endpoint_of(parse_arms([str(models["small"])]), port=0))
    assert httpx.get(f"{endpoint.url}/healthz", timeout=60, trust_env=False).status_code == 200


def test_an_arm_that_dies_ends_its_streams_and_comes_back(endpoint: Endpoint, http_client: httpx.Client) -> None:
    (arm,) = _actors("ray::ServeReplica:stillhouse~large~1")
    body: dict[str, Any] = {"model": "large", "messages": CHAT, "stream": True}
    with http_client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        arm.kill()
        *_, last = lines
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "arm_failed"
    # The other arm has not noticed.
    short = {"prompt": "a", "max_tokens": 1}
    assert http_client.post("/v1/completions", json={**short, "model": "small"}).status_code == 200
    deadline = time.monotonic() + 90
    while http_client.post("/v1/completions", json={**short, "model": "large"}).status_code != 200:
        assert time.monotonic() < deadline, "the arm did not come back"
        time.sleep(0.5)


# From here on the shared endpoint is down.


def test_shutdown_leaves_no_port_and_no_process(endpoint: Endpoint) -> None:
    ours = _actors("ray::ServeController") + _actors("ray::ServeReplica")
    assert len(ours) == 5  # Serve's controller, our control, a door, two arms
    address = httpx.URL(endpoint.url)
    with httpx.stream(
        "POST",
        f"{endpoint.url}/v1/chat/completions",
        json={"model": "small", "messages": CHAT, "stream": True},
        timeout=60,
        trust_env=False,
    ):  # somebody is still being answered
        start = time.monotonic()
        endpoint.shutdown()
        assert time.monotonic() - start < 30
    with socket.socket() as probe:
        assert probe.connect_ex((address.host, address.port)) != 0
    _, alive = psutil.wait_procs(ours, timeout=15)
    assert not [_title(process) for process in alive]
    endpoint.shutdown()  # twice is once


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"arms": ["gone=./not/there"]}, "there is no directory './not/there'"),
        ({"name": "small"}, "an arm has the endpoint's name 'small'"),
        ({"cpus": 4096.5}, "the 2 arms need 8193 CPU, the cluster has "),
        ({"gpus": 64}, "need 128 GPU"),
        ({"dtype": "int4"}, "arms.small.dtype"),
        ({"engine": "magic"}, "arms.small.engine"),
        ({"host": "192.0.2.1"}, "host 192.0.2.1 is open to others, and there are no API keys"),
        ({"port": 70000}, "port: "),
        ({"port": "taken"}, "Address already in use"),
    ],
)
def test_what_cannot_be_served_is_refused(
    endpoint: Endpoint, models: dict[str, Path], change: dict[str, Any], says: str
) -> None:
    endpoint.shutdown()
    with socket.socket() as neighbour:
        neighbour.bind(("127.0.0.1", 0))
        neighbour.listen()
        if change.get("port") == "taken":
            change = {"port": neighbour.getsockname()[1]}
        arms = parse_arms(change.get("arms", [str(path) for path in models.values()]))
        options = {"port": 0, **{name: value for name, value in change.items() if name != "arms"}}
        with pytest.raises(UserError, match=says):
            deploy(endpoint_of(arms, **options))
    assert not serve.status().applications  # nothing was even started


def test_an_arm_that_does_not_load_is_named_and_taken_down(
    endpoint: Endpoint, models: dict[str, Path], tmp_path: Path
) -> None:
    endpoint.shutdown()
    for file in models["small"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(RunError, match=r"stillhouse~broken~1 did not start: .*SafetensorError"):
        deploy(endpoint_of([Arm("broken", str(tmp_path))], port=0))
    assert not serve.status().applications
    assert threading.active_count() < 50


def _actors(title: str) -> list[psutil.Process]:
    """This test's own processes with such a title."""
    return [child for child in psutil.Process().children(recursive=True) if _title(child).startswith(title)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
