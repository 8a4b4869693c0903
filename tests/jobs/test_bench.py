"""`stillhouse bench` as it is typed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.cli.main import main
from tests.serving.bench.endpoint import Endpoint

Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint(first_s=0.005, rest_s=0.005)
    yield server
    server.stop()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Typed:
    def typed(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stillhouse", "bench", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), out, err

    return typed


def test_a_table(bench: Typed, endpoint: Endpoint) -> None:
    code, out, err = bench(endpoint.url, "--requests", "4", "--concurrency", "2")
    assert (code, err) == (0, "")
    assert "arm-of-split" in out and "closed loop, 2 at a time" in out


def test_json_samples_and_every_option(bench: Typed, endpoint: Endpoint, tmp_path: Path) -> None:
    samples = tmp_path / "samples.jsonl"
    options = ["--rate", "50", "--duration", "2", "--requests", "5", "--model", "x", "--model", "y", "--warmup", "0"]
    options += ["--prompt-tokens", "uniform:40:90", "--max-tokens", "lognormal:8:0.4", "--seed", "4", "--timeout", "30"]
    code, out, err = bench(endpoint.url, *options, "--samples", str(samples), "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert {arm["arm"]: arm["count"] for arm in result["arms"]} == {"arm-of-x": 5, "arm-of-y": 5}
    assert len(samples.read_text().splitlines()) == 10
    assert result["settings"]["prompt_tokens"] == "uniform:40:90"
    # What it wrote can be replayed.
    code, out, _ = bench(endpoint.url, "--trace", str(samples), "--warmup", "0", "--json")
    assert code == 0 and sum(arm["count"] for arm in json.loads(out)["arms"]) == 10


def test_a_file_of_prompts_and_the_completions_call(bench: Typed, endpoint: Endpoint, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one?\ntwo?\n")
    code, _, _ = bench(
        endpoint.url,
        "--api",
        "completions",
        "--prompts",
        str(tmp_path / "p.txt"),
        "--requests",
        "2",
        "--model",
        "completer",
    )
    assert code == 0
    assert [asked["prompt"] for asked in endpoint.seen] == ["one?", "one?", "two?"]


def test_the_key_may_come_from_the_environment_and_is_never_shown(
    bench: Typed, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLHOUSE_API_KEY", "sk-very-secret")
    code, out, err = bench(endpoint.url, "--requests", "1", "--json")
    assert code == 0
    assert {headers["authorization"] for headers in endpoint.headers} == {"Bearer sk-very-secret"}
    assert "secret" not in out + err
    code, out, err = bench(endpoint.url, "--model", "echoes the key")
    assert code == 1
    assert "Incorrect API key" in err and "secret" not in out + err
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = bench("--help")
    assert code == 0 and "STILLHOUSE_API_KEY" in out and "secret" not in out + err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rate", "-1"], "rate is -1; allowed: a finite number above 0"),
        (["--requests", "0"], "requests is 0"),
        (["--rate", "1", "--concurrency", "2"], "concurrency is of the closed loop"),
        (["--max-tokens", "some"], "--max-tokens is 'some'; allowed: N, uniform:LOW:HIGH"),
        (["--prompt-tokens", "uniform:9:3"], "--prompt-tokens is 'uniform:9:3'"),
        (["--trace", "/nowhere/trace.csv"], "/nowhere/trace.csv cannot be read"),
        (["--prompts", "/nowhere/p.txt"], "/nowhere/p.txt cannot be read"),
        (["--samples", "/nowhere/s.jsonl"], "a file in a folder that is there"),
    ],
)
def test_a_mistake_costs_one_line_and_sends_nothing(
    bench: Typed, endpoint: Endpoint, options: list[str], says: str
) -> None:
    code, out, err = bench(endpoint.url, *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and says in err
    assert endpoint.seen == []
