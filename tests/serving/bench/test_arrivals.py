"""Poisson arrivals are Poisson, and traces are read as they were meant or refused."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import UserError
from serving.bench.arrivals import Arrival, poisson, read_trace
from serving.bench.sample import Sample

N = 20_000


@pytest.mark.parametrize("rate", [0.5, 50.0])
def test_gaps_are_exponential_with_the_right_rate(rate: float) -> None:
    at = np.array([arrival.at for arrival in islice(poisson(rate, seed=7), N)])
    gaps = np.sort(np.diff(at, prepend=0.0))
    assert gaps.min() >= 0
    assert gaps.mean() * rate == pytest.approx(1.0, abs=3 / np.sqrt(N))
    # Kolmogorov-Smirnov: the distance from the exponential stays below its 99 % point.
    cdf = 1 - np.exp(-gaps * rate)
    steps = np.arange(N + 1) / N
    distance = max(np.abs(cdf - steps[1:]).max(), np.abs(cdf - steps[:-1]).max())
    assert distance < 1.63 / np.sqrt(N)


def test_gaps_do_not_depend_on_each_other() -> None:
    at = np.array([arrival.at for arrival in islice(poisson(10.0, seed=7), N)])
    gaps = np.diff(at, prepend=0.0)
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 3 / np.sqrt(N)
    counts = np.bincount(at.astype(int))[:-1]  # per second
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=3 * np.sqrt(2 / len(counts)))


def test_a_seed_repeats_its_arrivals() -> None:
    def first(seed: int) -> list[Arrival]:
        return list(islice(poisson(3.0, seed), 600))

    assert first(1) == first(1)
    assert first(1) != first(2)


def test_both_forms_of_a_trace(tmp_path: Path) -> None:
    expected = [Arrival(0.0, 128, 16), Arrival(0.5), Arrival(2.0, None, 8)]
    (tmp_path / "a.csv").write_text("max_tokens,at,prompt_tokens,more\n,100.5,,x\n16,100,128,y\n8,102,,z\n")
    (tmp_path / "a.jsonl").write_text(
        '{"at": 100.5}\n\n{"at": 100, "prompt_tokens": 128, "max_tokens": 16}\n{"at": 102, "completion_tokens": 8}\n'
    )
    assert read_trace(tmp_path / "a.csv") == expected
    assert read_trace(tmp_path / "a.jsonl") == expected


def test_recorded_samples_are_a_trace(tmp_path: Path) -> None:
    import json

    samples = [
        Sample("a", at=0.25, first_token_ms=1.0, latency_ms=2.0, prompt_tokens=12, completion_tokens=7),
        Sample("b", at=0.75, error="timeout", detail="TimeoutError"),
    ]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(sample.as_dict(1.8e9)) + "\n" for sample in samples))
    first, second = read_trace(path)
    assert first == Arrival(0.0, 12, 7)
    assert (second.at, second.prompt_tokens, second.max_tokens) == (pytest.approx(0.5, abs=1e-5), None, None)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "when,what\n1,2\n", "no column `at`"),
        ("a.csv", "at,max_tokens\n1,\n\nsoon,\n", "line 4: `at` is 'soon'"),
        ("a.csv", "at\nnan\n", "`at` is 'nan'"),
        ("a.csv", "at,max_tokens\n1,-3\n", "a length is '-3'"),
        ("a.csv", "at\n", "has no arrivals"),
        ("a.csv", "", "has no arrivals"),
        ("a.jsonl", '{"at": 1}\n{"at"\n', "line 2 is not a JSON object"),
        ("a.jsonl", '{"at": 1}\n[1]\n', "line 2 is not a JSON object"),
        ("a.jsonl", '{"time": 1}\n', "`at` is None"),
        ("a.jsonl", '{"at": 1, "prompt_tokens": "many"}\n', "a length is 'many'"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        read_trace(tmp_path / name)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_trace(tmp_path / "none.csv")
    (tmp_path / "bytes.csv").write_bytes(b"at\n\xff\n")
    with pytest.raises(UserError, match="it is not UTF-8"):
        read_trace(tmp_path / "bytes.csv")
