"""What a result holds, and that table, JSON and samples say the same."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from cluster.errors import RunError
from serving.bench import BenchResult, Sample, Settings
from serving.bench.progress import ProgressLine, line
from serving.bench.result import summarise_run
from serving.bench.run import Progress
from serving.bench.table import render


def answer(arm: str, first: float, whole: float, tokens: int = 5, late: float = 0.0, at: float = 0.0) -> Sample:
    gap = (whole - first) / (tokens - 1)
    return Sample(arm, at, late, first, whole, 20, tokens, gaps_ms=(gap,) * (tokens - 1))


def failure(arm: str, kind: str, detail: str) -> Sample:
    return Sample(arm, error=kind, detail=detail)


def shown(result: BenchResult, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(render(result))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_figures_are_over_answers_only() -> None:
    samples = [answer("a", float(i), float(10 * i)) for i in range(101)]
    samples += [failure("a", "no_done", "broken off"), failure("b", "no_done", "broken off")]
    result = summarise_run(Settings("http://x"), samples, 10.0, 1.8e9)
    a, b = result.arms
    assert [a.first_token_ms[q] for q in ("mean", "p50", "p90", "p95", "p99")] == [50.0, 50.0, 90.0, 95.0, 99.0]  # type: ignore[literal-required]
    assert [a.latency_ms[q] for q in ("p50", "p95", "p99")] == [500.0, 950.0, 990.0]  # type: ignore[literal-required]
    assert a.per_token_ms["p50"] == 450 / 4 == a.gaps_ms["p50"]
    assert (a.per_token_ms["count"], a.gaps_ms["count"]) == (101, 404)
    assert (a.count, a.errors, a.error_kinds) == (101, 1, {"no_done": 1})
    assert a.tokens_per_s == pytest.approx(101 * 5 / (sum(range(101)) * 10 / 1000))
    assert (a.total_tokens_per_s, a.requests_per_s) == (50.5, 10.1)
    assert (b.count, b.errors, b.first_token_ms, b.tokens_per_s) == (0, 1, {}, 0.0)
    assert result.tokens_per_s == 50.5
    assert result.errors == {"a: broken off": 1, "b: broken off": 1}


def test_one_token_has_no_time_per_token() -> None:
    sample = Sample("a", first_token_ms=3.0, latency_ms=4.0, completion_tokens=1)
    (arm,) = summarise_run(Settings("http://x"), [sample], 1.0, 0.0).arms
    assert arm.per_token_ms == {} and arm.gaps_ms == {}
    assert "per token" not in shown(summarise_run(Settings("http://x"), [sample], 1.0, 0.0))


def test_no_answer_at_all() -> None:
    with pytest.raises(RunError, match="none of 2 requests to http://x was answered; 2 times a: 503 full"):
        summarise_run(Settings("http://x"), [failure("a", "http_503", "503 full")] * 2, 1.0, 0.0)
    with pytest.raises(RunError, match="no request was due"):
        summarise_run(Settings("http://x"), [], 1.0, 0.0)


def test_all_renderings_say_the_same(tmp_path: Path) -> None:
    settings = Settings("http://127.0.0.1:8000", rate=4.0, api_key="sk-secret")
    samples = [answer("small", 12.4, 1234.5, 10, late=0.3, at=i / 4) for i in range(8)]
    samples.append(failure("large", "http_503", "503 full"))
    result = summarise_run(settings, samples, 2.0, 1.8e9, lags_ms=[0.2] * 10)
    row = json.loads(json.dumps(result.as_dict()))
    assert (row["url"], row["started"], row["seconds"]) == ("http://127.0.0.1:8000", 1.8e9, 2.0)
    assert row["settings"]["load"] == "open loop, 4 requests/s (Poisson)"
    large, small = row["arms"]
    assert (large["errors"], large["error_kinds"], large["latency_ms"]) == (1, {"http_503": 1}, {})
    assert small["latency_ms"]["p95"] == 1234.5
    assert small["latency_ms"]["intervals"]["p50"] == [1234.5, 1234.5]
    assert small["latency_ms"]["intervals"]["p99"] == [1234.5, None]  # eight are too few
    assert row["pace"]["kept"] and row["pace"]["late_ms"]["p99"] == pytest.approx(0.3)
    assert row["pace"]["answered_per_s"] == 4.0
    assert "samples" not in row and "sk-secret" not in json.dumps(row)

    text = shown(result)
    for part in ("1234", "12.4", "1 times large: 503 full", "4 requests/s (Poisson)", "4 answers/s of 4 asked for"):
        assert part in text, text
    assert "sent late by 0.3 (p50), 0.3 ms (p99)" in text
    assert "…" not in text and max(map(len, text.splitlines())) <= 80  # an 80-column terminal shows it whole

    result.write_samples(tmp_path / "samples.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]
    written = [json.loads(text) for text in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(written) == 9
    assert written[1] == {
        "arm": "small",
        "at": 1.8e9 + 0.25,
        "prompt_tokens": 20,
        "completion_tokens": 10,
        "first_token_ms": 12.4,
        "latency_ms": 1234.5,
        "per_token_ms": 135.789,
        "late_ms": 0.3,
        "gaps_ms": [135.789] * 9,
        "error": None,
        "detail": "",
    }
    assert (written[8]["error"], written[8]["latency_ms"]) == ("http_503", None)


def test_wide_figures_fit_a_terminal() -> None:
    samples = [answer("a-rather-long-name-of-an-arm", 10_000.0 + i, 123_456.0 + i) for i in range(400)]
    text = shown(summarise_run(Settings("http://x"), samples, 1.0, 0.0, [0.1]))
    assert "…" not in text and "latency, s" in text and "124" in text and max(map(len, text.splitlines())) <= 80


def test_samples_that_cannot_be_written(tmp_path: Path) -> None:
    result = summarise_run(Settings("http://x"), [answer("a", 1.0, 2.0)], 1.0, 0.0)
    with pytest.raises(RunError, match="could not be written"):
        result.write_samples(tmp_path / "none" / "samples.jsonl")


def test_rows_for_the_familys_report() -> None:
    samples = [answer("a", 10.0, 100.0), failure("b", "timeout", "TimeoutError")]
    a, b = summarise_run(Settings("http://x"), samples, 1.0, 0.0).rows()
    assert a == {
        "arm": "a",
        "count": 1,
        "errors": 0,
        "tokens_per_s": pytest.approx(50.0),
        "first_token_ms": {"p50": 10.0, "p95": 10.0, "p99": 10.0},
        "latency_ms": {"p50": 100.0, "p95": 100.0, "p99": 100.0},
    }
    assert (b["errors"], b["latency_ms"]) == (1, {})


@pytest.mark.parametrize(
    ("late", "lag", "kept"),
    [(0.0, 0.0, True), (9.0, 0.0, True), (11.0, 0.0, False), (0.0, 11.0, False)],
)
def test_pace_is_judged_by_the_time_to_the_first_token(late: float, lag: float, kept: bool) -> None:
    samples = [answer("a", 100.0, 200.0, late=late, at=float(i)) for i in range(5)]
    result = summarise_run(Settings("http://x", rate=1.0), samples, 5.0, 0.0, [lag] * 5)
    assert result.pace.kept is kept
    assert any("keep pace" in warning for warning in result.warnings) is not kept
    assert ("warning: the generator did not keep pace" in shown(result)) is not kept


def test_what_one_must_know_is_said() -> None:
    uncounted = Sample("a", first_token_ms=1.0, latency_ms=2.0, completion_tokens=2, counted=False)
    empty = Sample("a", first_token_ms=1.0, latency_ms=2.0)
    samples = [uncounted, empty, failure("a", "timeout", "x"), failure("a", "generator", "x")]
    said = " ".join(summarise_run(Settings("http://x", timeout_s=9), samples, 1.0, 0.0).warnings)
    for part in ("without usage", "empty", "1 requests took over 9 s", "ulimit -n"):
        assert part in said


def test_progress_in_a_pipe_is_a_line_now_and_then() -> None:
    console = Console(file=io.StringIO(), width=80)
    with ProgressLine(console) as progress:
        for seconds in (1.0, 9.0, 10.5, 12.0, 19.0, 21.0):
            progress.show(Progress(100, None, sent=7, done=5, errors=1, seconds=seconds))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines == [f"{s} s: 7 of 100 requests sent, 2 under way, 1 failed" for s in (10, 21)]
    assert line(Progress(None, 60.0, sent=7, done=5, seconds=3)) == "3 of 60 s: 7 requests sent, 2 under way, 0 failed"


def test_progress_on_a_terminal_is_one_line_that_goes() -> None:
    console = Console(file=io.StringIO(), width=60, force_terminal=True)
    with ProgressLine(console) as progress:
        for seconds in (1.0, 2.0):
            progress.show(Progress(100, 60.0, sent=7, done=5, seconds=seconds))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "2 of 60 s: 7 of 100" in text
    assert text.rstrip().endswith(("\x1b[2K", "\x1b[?25h")) or "\x1b[2K" in text.split("2 of 60 s")[-1]
