"""Prompts, lengths, and which model gets what."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import UserError
from serving.bench.arrivals import Arrival
from serving.bench.lengths import parse_length
from serving.bench.settings import Settings
from serving.bench.workload import Job, WordScale, jobs, read_prompts, synthetic


def drawn(text: str, n: int = 20_000) -> np.ndarray:
    length, rng = parse_length(text, "--x"), np.random.default_rng(3)
    return np.array([length.draw(rng) for _ in range(n)])


def test_lengths_are_of_their_distribution() -> None:
    assert set(drawn("128", 10)) == {128}
    uniform = drawn("uniform:3:6")
    assert Counter(uniform).keys() == {3, 4, 5, 6}
    assert np.bincount(uniform)[3:].min() > 4_700
    lognormal = drawn("lognormal:200:0.5")
    assert lognormal.mean() == pytest.approx(200, rel=0.02)
    assert np.log(lognormal).std() == pytest.approx(0.5, rel=0.03)
    assert drawn("lognormal:1:3").min() == 1
    assert [str(parse_length(text, "--x")) for text in ("128", "uniform:3:6", "lognormal:200:0.5")] == [
        "128",
        "uniform:3:6",
        "lognormal:200:0.5",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "allowed: N, uniform"),
        ("many", "allowed: N, uniform"),
        ("normal:3:4", "allowed: N, uniform"),
        ("uniform:3", "allowed: N, uniform"),
        ("uniform:3:4:5", "allowed: N, uniform"),
        ("nan", "allowed: N, uniform"),
        ("uniform:inf:3", "allowed: N, uniform"),
        ("0", "from 1 to"),
        ("-4", "from 1 to"),
        ("2000000", "from 1 to"),
        ("1.5", "whole numbers"),
        ("uniform:1:2.5", "whole numbers"),
        ("uniform:9:3", "LOW must not be above HIGH"),
        ("lognormal:0.5:1", "from 1 to"),
        ("lognormal:50:-1", "SIGMA"),
        ("lognormal:50:9", "SIGMA"),
    ],
)
def test_what_is_no_length_is_refused(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as raised:
        parse_length(text, "--max-tokens")
    assert "--max-tokens is" in str(raised.value)


def test_prompt_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("what?\n\n  and {why}?  \n")
    assert read_prompts(tmp_path / "a.txt") == ["what?", "and {why}?"]
    chat = [{"role": "user", "content": "hé"}]
    (tmp_path / "a.dat").write_text('{"prompt": "what?", "id": 3}\n{"messages": [{"role": "user", "content": "hé"}]}\n')
    assert read_prompts(tmp_path / "a.dat") == ["what?", chat]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no prompts"),
        ("\n \n", "no prompts"),
        ("what?", "line 1 is not a JSON object"),
        ('{"text": "a"}', "line 1 needs `prompt`"),
        ('{"prompt": "a"}\n{"prompt": 3}', "line 2 needs `prompt`"),
        ('{"prompt": ""}', "line 1 needs `prompt`"),
        ('{"messages": []}', "line 1 needs `prompt`"),
        ('{"messages": ["a"]}', "line 1 needs `prompt`"),
        ('{"prompt": "a", "messages": [{"role": "user"}]}', "only one of them"),
    ],
)
def test_what_holds_no_prompts_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match=says):
        read_prompts(tmp_path / "a.jsonl")


def made(
    arrivals: list[Arrival], models: list[str], scales: dict[str, WordScale] | None = None, **to: Any
) -> list[Job]:
    return list(jobs(Settings("http://x", **to), arrivals, ["p", "q"], models, scales or {}))


def test_each_model_gets_each_prompt_in_turn() -> None:
    asked = [(job.model, job.prompt) for job in made([Arrival(0.0)] * 6, ["x", "y"])]
    assert asked == [("x", "p"), ("y", "p"), ("x", "q"), ("y", "q"), ("x", "p"), ("y", "p")]


def test_in_an_open_loop_the_order_changes_but_not_the_shares() -> None:
    asked = made(
        [Arrival(i / 10) for i in range(400)], ["x", "y"], rate=10.0, max_tokens=parse_length("uniform:1:99", "")
    )
    pairs = list(zip(asked[::2], asked[1::2], strict=True))
    assert all({a.model, b.model} == {"x", "y"} for a, b in pairs)
    assert all(a.prompt == b.prompt and a.max_tokens == b.max_tokens for a, b in pairs)
    assert 60 < sum(a.model == "x" for a, _ in pairs) < 140
    assert len({a.max_tokens for a, _ in pairs}) > 50
    assert [job.at for job in asked] == [i / 10 for i in range(400)]


def test_lengths_of_a_trace_and_of_the_settings() -> None:
    arrivals = [Arrival(0.0, prompt_tokens=5, max_tokens=6), Arrival(1.0)]
    first, second = made(arrivals, ["x"], trace=Path("t"))
    assert len(str(first.prompt).split()) == 5 and first.max_tokens == 6
    assert (second.prompt, second.max_tokens) == ("q", 32)
    told = {"prompt_tokens": parse_length("3", ""), "max_tokens": parse_length("4", "")}
    for job in made(arrivals, ["x"], trace=Path("t"), **told):
        assert len(str(job.prompt).split()) == 3 and job.max_tokens == 4
    assert [job.prompt for job in made(arrivals, ["x"], trace=Path("t"), prompts=Path("f"))] == ["p", "q"]


def test_synthetic_prompts_have_the_tokens_that_the_server_counts() -> None:
    scale = WordScale.through((4, 22), (36, 118))
    assert (scale.base, scale.per_word) == (10.0, 3.0)
    (job,) = made([Arrival(0.0)], ["x"], {"x": scale}, prompt_tokens=parse_length("100", ""))
    assert 10 + 3 * len(str(job.prompt).split()) == 100
    assert scale.words(5) == 1  # below what the template alone takes
    assert WordScale.through((4, 0), (36, 0)) == WordScale(0.0, 1.0)  # a server that counts nothing


def test_no_two_synthetic_prompts_begin_alike_and_a_seed_repeats_them() -> None:
    to = {"prompt_tokens": parse_length("40", "")}
    texts = [str(job.prompt) for job in made([Arrival(0.0)] * 200, ["x"], **to)]
    assert len({text[:20] for text in texts}) > 190
    assert texts == [str(job.prompt) for job in made([Arrival(0.0)] * 200, ["x"], **to)]
    assert texts[0] != str(made([Arrival(0.0)], ["x"], seed=1, **to)[0].prompt)
    assert len(synthetic(7, np.random.default_rng(0)).split()) == 7
