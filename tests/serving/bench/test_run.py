"""Whole runs against a real HTTP server whose answers, delays and failures are known."""

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import RunError, UserError
from serving.bench import BenchResult, Sample, Settings, measure, run_bench
from serving.bench.lengths import parse_length
from serving.bench.run import Progress
from tests.serving.bench.endpoint import FIRST_S, REST_S, TOKENS, Endpoint


@pytest.fixture
def quick() -> Iterator[Endpoint]:
    """An endpoint that answers in some milliseconds."""
    server = Endpoint(first_s=0.005, rest_s=0.005)
    yield server
    server.stop()


def run(url: str, **settings: Any) -> BenchResult:
    return asyncio.run(measure(Settings(url, **settings)))


def prompts_of(endpoint: Endpoint) -> list[tuple[str, str]]:
    return [(asked["model"], asked["messages"][0]["content"]) for asked in endpoint.seen]


def latency(sample: Sample) -> float:
    assert sample.latency_ms is not None
    return sample.latency_ms


def test_times_counts_and_concurrency(endpoint: Endpoint) -> None:
    result = run_bench(endpoint.url, requests=6, concurrency=3, max_tokens=9, prompts=["p", "q"])
    (arm,) = result.arms
    assert (arm.arm, arm.count, arm.errors, result.errors) == ("arm-of-split", 6, 0, {})
    assert FIRST_S * 1000 <= arm.first_token_ms["p50"] < FIRST_S * 1000 + 5000
    assert (FIRST_S + REST_S) * 1000 <= arm.latency_ms["p50"] < (FIRST_S + REST_S) * 1000 + 5000
    # Sample by sample, for on a busy machine the slowest first token may come later than the median answer ends.
    gaps = [latency(sample) - sample.first_token_ms for sample in result.samples if sample.first_token_ms is not None]
    assert len(gaps) == 6 and min(gaps) > 0
    assert arm.tokens_per_s < TOKENS / (FIRST_S + REST_S)
    assert endpoint.most_running == 3
    assert result.seconds >= 2 * (FIRST_S + REST_S)
    assert result.tokens_per_s == pytest.approx(6 * TOKENS / result.seconds) == arm.total_tokens_per_s
    assert result.pace.answered_per_s == pytest.approx(6 / result.seconds)
    assert (result.pace.asked_per_s, result.pace.late_ms) == (None, {})
    # One warm-up for each model listed, uncounted; then the prompts in turn.
    assert prompts_of(endpoint)[:2] == [("split", "p"), ("good", "p")]
    assert sorted(prompts_of(endpoint)[2:]) == [("split", "p")] * 3 + [("split", "q")] * 3


def test_a_list_that_is_not_ours_is_not_warmed_up(quick: Endpoint) -> None:
    quick.models = [{"id": "first"}, {"id": "costly"}]
    run(quick.url, requests=2, warmup=3)
    assert {model for model, _ in prompts_of(quick)} == {"first"}
    assert len(quick.seen) == 5


def test_each_model_named_is_warmed_up_and_measured_alike(quick: Endpoint) -> None:
    result = run_bench(quick.url, requests=3, concurrency=1, max_tokens=9, prompts=["p", "q"], models=["x", "plain"])
    asked = [("x", "p"), ("plain", "p"), ("x", "q"), ("plain", "q"), ("x", "p"), ("plain", "p")]
    assert prompts_of(quick) == [("x", "p"), ("plain", "p"), *asked]
    assert [(arm.arm, arm.count) for arm in result.arms] == [("arm-of-x", 3), ("plain", 3)]


def test_failures_are_counted_by_kind_and_named(endpoint: Endpoint) -> None:
    models = ["good", "broken", "cut", "undone", "busy"]
    result = run_bench(endpoint.url, requests=2, concurrency=2, max_tokens=9, prompts=["p"], models=models)
    assert {arm.arm: (arm.count, arm.errors, arm.error_kinds) for arm in result.arms} == {
        "arm-of-good": (2, 0, {}),
        "arm-of-broken": (0, 2, {"error_event": 2}),
        "arm-of-cut": (0, 2, {"disconnected": 2}),
        "arm-of-undone": (0, 2, {"no_done": 2}),
        "busy": (0, 2, {"http_503": 2}),
    }
    assert result.errors["arm-of-broken: arm failed"] == 2
    assert result.errors["busy: 503 full"] == 2
    assert result.tokens_per_s == pytest.approx(2 * TOKENS / result.seconds)  # of answers only


def test_a_closed_loop_can_end_by_the_clock(quick: Endpoint) -> None:
    result = run(quick.url, duration_s=0.5, concurrency=2)
    assert 0.4 < result.seconds < 3
    assert max(sample.at for sample in result.samples) < 0.5
    assert len(result.samples) == len(quick.seen) - 2 > 2
    assert len(run(quick.url, duration_s=60, requests=3).samples) == 3


def test_an_open_loop_shows_a_stall_in_every_request_that_was_due_meanwhile(quick: Endpoint) -> None:
    quick.freeze_at, quick.freeze_s = 52, 1.0
    result = run(quick.url, rate=100.0, duration_s=3.0)
    began, ended = quick.frozen
    assert ended - began >= 1.0
    due = {sample: result.started + sample.at for sample in result.samples}
    meanwhile = [sample for sample, at in due.items() if began + 0.01 < at < ended - 0.1]
    assert 60 < len(meanwhile) < 130  # they came all the same
    # None was answered before the server went on, and each counts its wait from when it was due.
    assert [s for s in meanwhile if s.error or latency(s) < 1000 * (ended - due[s]) - 5] == []
    (arm,) = result.arms
    assert arm.errors == 0
    assert arm.latency_ms["p99"] > 900
    assert arm.first_token_ms["p99"] > 900
    stalled = sum(latency(sample) > 500 for sample in result.samples if not sample.error) / len(result.samples)
    assert stalled > 0.1  # half a second of three is a sixth


def test_a_closed_loop_would_have_hidden_it(quick: Endpoint) -> None:
    quick.freeze_at, quick.freeze_s = 10, 1.0
    result = run(quick.url, duration_s=3.0)
    assert 1 <= sum(latency(sample) > 900 for sample in result.samples) <= 3  # a busy machine may add to the one


def test_requests_of_an_open_loop_wait_for_no_other(endpoint: Endpoint) -> None:
    result = run(endpoint.url, rate=400.0, requests=60)
    assert endpoint.most_running > 20
    assert result.seconds < 60 * (FIRST_S + REST_S) / 4
    assert result.pace.asked_per_s == 400.0


def test_an_open_loop_sends_at_the_asked_rate(quick: Endpoint) -> None:
    result = run(quick.url, rate=100.0, duration_s=2.0, seed=3)
    assert 200 - 3 * 200**0.5 < len(result.samples) < 200 + 3 * 200**0.5
    again = run(quick.url, rate=100.0, duration_s=2.0, seed=3)
    assert [sample.at for sample in again.samples] == [sample.at for sample in result.samples]
    assert all(sample.late_ms >= 0 for sample in result.samples)


def test_a_trace_is_replayed_on_time_with_its_lengths(quick: Endpoint, tmp_path: Path) -> None:
    at = [5.0, 5.0, 5.1, 5.5, 5.55, 6.2]
    rows = [{"at": moment, "prompt_tokens": 40 + 30 * i, "max_tokens": i + 1} for i, moment in enumerate(at)]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    result = run(quick.url, models=("x",), trace=trace)
    assert [sample.at for sample in result.samples] == pytest.approx([moment - 5 for moment in at])
    came = np.array(quick.at[3:])  # behind a warm-up and two requests that weigh words
    late = came - np.array(at)
    # The one that came through fastest says when the trace began; none is sent before its time.
    assert np.median(late - late.min()) < 0.05 and all(sample.late_ms >= 0 for sample in result.samples)
    assert sorted(asked["max_tokens"] for asked in quick.seen[3:]) == [1, 2, 3, 4, 5, 6]
    # The server counts 10 + 3 per word.
    assert sorted(sample.prompt_tokens for sample in result.samples) == [40, 70, 100, 130, 160, 190]
    assert result.pace.asked_per_s == pytest.approx(6 / 1.2)
    assert len(run(quick.url, models=("x",), trace=trace, duration_s=0.52).samples) == 4
    assert len(run(quick.url, models=("x",), trace=trace, requests=3).samples) == 3


def test_synthetic_prompts_come_out_as_long_as_asked_for(quick: Endpoint) -> None:
    result = run(
        quick.url, requests=4, prompt_tokens=parse_length("100", ""), max_tokens=parse_length("uniform:3:5", "")
    )
    assert result.arms[0].prompt_tokens["mean"] == 100
    assert {asked["max_tokens"] for asked in quick.seen[4:]} <= {3, 4, 5}
    assert len({content for _, content in prompts_of(quick)[4:]}) == 4


def test_a_generator_that_is_late_says_so(quick: Endpoint) -> None:
    def busy(_: Progress) -> None:
        time.sleep(0.3)  # in the event loop: nothing is sent or read meanwhile

    result = asyncio.run(measure(Settings(quick.url, rate=50.0, duration_s=1.5), show=busy))
    assert not result.pace.kept
    assert result.pace.late_ms["p99"] > 100
    assert result.pace.loop_lag_ms["p99"] > 100
    assert any("the generator did not keep pace" in warning for warning in result.warnings)
    late = max(result.samples, key=lambda sample: sample.late_ms)
    assert late.first_token_ms is not None and late.first_token_ms > late.late_ms  # its own delay is not taken off


def test_progress_is_shown(quick: Endpoint) -> None:
    seen: list[tuple[int, int | None, float]] = []

    def show(progress: Progress) -> None:
        seen.append((progress.done, progress.total, progress.seconds))
        assert progress.done <= progress.sent

    asyncio.run(measure(Settings(quick.url, rate=20.0, requests=30), show=show))
    assert seen and seen[0][1] == 30 and seen == sorted(seen)


def test_time_limits_are_counted_and_said(endpoint: Endpoint) -> None:
    result = run(endpoint.url, models=("hangs", "good"), requests=2, timeout_s=2.0, concurrency=4)
    assert [(arm.arm, arm.error_kinds) for arm in result.arms] == [
        ("arm-of-good", {}),
        ("arm-of-hangs", {"timeout": 2}),
    ]
    assert any("2 requests took over 2 s" in warning for warning in result.warnings)


@pytest.mark.parametrize("models", [("busy",), ("busy", "limited")])
def test_when_no_warm_up_is_answered_nothing_is_measured(endpoint: Endpoint, models: tuple[str, ...]) -> None:
    with pytest.raises(RunError, match=r"none of \d warm-up requests to .* was answered; \d times busy: 503 full"):
        run(endpoint.url, models=models, requests=1000, warmup=1)
    assert len(endpoint.seen) == len(models)


def test_nothing_answered_is_an_error(endpoint: Endpoint) -> None:
    with pytest.raises(RunError, match=r"none of 3 requests to .* was answered; 3 times busy: 503 full"):
        run(endpoint.url, models=("busy",), requests=3, warmup=0)


def test_nobody_there(endpoint: Endpoint) -> None:
    endpoint.stop()
    with pytest.raises(RunError, match=r"/v1/models gave no list of models \(ClientConnectorError"):
        run(endpoint.url, requests=1)
    with pytest.raises(RunError, match=r"none of 1 warm-up requests .* ClientConnectorError"):
        run(endpoint.url, requests=1, models=("good",))


def test_no_models_there(endpoint: Endpoint) -> None:
    endpoint.models = []
    with pytest.raises(RunError, match="lists no models"):
        run(endpoint.url, requests=1)


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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"url": "http://x:99999"}, "is not a URL"),
        ({"url": "http://me:secret@x"}, "the URL holds a name or password"),
        ({"url": "http://x/?key=1"}, "more than a path"),
        ({"rate": 0.0}, "rate is 0; allowed: a finite number above 0"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"rate": float("inf")}, "rate is inf"),
        ({"duration_s": -1.0}, "duration is -1"),
        ({"timeout_s": 0.0}, "timeout is 0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"rate": 1.0, "trace": Path("t")}, "both rate and trace"),
        ({"rate": 1.0, "concurrency": 2}, "concurrency is of the closed loop"),
        ({"trace": Path("t"), "concurrency": 2}, "concurrency is of the closed loop"),
        ({"prompts": Path("p"), "prompt_tokens": parse_length("3", "")}, "both prompts and prompt_tokens"),
        ({"api": "embeddings"}, "api is 'embeddings'"),
        ({"api_key": "a\nb"}, "no HTTP header can hold"),
        ({"trace": Path("/nowhere/t")}, "/nowhere/t cannot be read"),
        ({"prompts": Path("/nowhere/p")}, "/nowhere/p cannot be read"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as raised:
        run(**{"url": "http://127.0.0.1:9", **change})
    assert "secret" not in str(raised.value) and "\n" not in str(raised.value)
