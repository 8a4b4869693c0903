"""The vLLM engine with the real vLLM, where it is installed, and what is said where it is not."""

import asyncio
import importlib.util
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import UserError
from serving.engines import open_engine
from serving.engines.base import Delta, Load, Sampling, UnsupportedError

THERE = importlib.util.find_spec("vllm") is not None
integration = pytest.mark.integration
needs_vllm = pytest.mark.skipif(not THERE, reason="vLLM is not installed: it wants an environment of its own")

GREEDY = Sampling(max_tokens=16, temperature=0)


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


@pytest.mark.skipif(THERE, reason="vLLM is installed")
def test_an_absent_vllm_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pip install vllm, or use the transformers engine"):
        open_engine("vllm", tmp_path)


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with heads of 64: vLLM's attention on a CPU takes no smaller ones than 32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("wide")
    shutil.copytree(tiny_model, directory, dirs_exist_ok=True)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(tiny_model, head_dim=64)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        engine = open_engine("vllm", model, "float32", threads=1, slots=4)
    yield engine
    asyncio.run(engine.close())


@integration
@needs_vllm
def test_it_says_what_the_transformers_engine_says(engine: Any, model: Path, ask: Any) -> None:
    """Greedy text, log-probabilities, alternatives, ends: token by token."""
    other = open_engine("transformers", model, "float32")
    wish = replace(GREEDY, logprobs=3)
    requests = [(engine.encode(word), wish) for word in ("hello", "sky", "a longer prompt than those")]
    for mine, reference in zip(ask(engine, *requests), ask(other, *requests), strict=True):
        assert text_of(mine) == text_of(reference)
        assert (mine[-1].finish_reason, mine[-1].completion_tokens) == (
            reference[-1].finish_reason,
            reference[-1].completion_tokens,
        )
        told, expected = ([one for delta in deltas for one in delta.logprobs] for deltas in (mine, reference))
        assert [one.token_id for one in told] == [one.token_id for one in expected]
        assert [one.logprob for one in told] == pytest.approx([one.logprob for one in expected], abs=1e-3)
        assert [[alt.token_id for alt in one.top] for one in told] == [
            [alt.token_id for alt in one.top] for one in expected
        ]
    assert engine.context == other.context
    asyncio.run(other.close())


@integration
@needs_vllm
def test_it_streams_and_stops_at_a_stop_string(engine: Any, ask: Any) -> None:
    (whole,) = ask(engine, (engine.encode("hello"), GREEDY))
    assert len(whole) > 3
    stop = text_of(whole)[4:7]
    (deltas,) = ask(engine, (engine.encode("hello"), replace(GREEDY, stop=(stop,))))
    assert text_of(deltas) == text_of(whole)[: text_of(whole).index(stop)]
    assert deltas[-1].finish_reason == "stop"


@integration
@needs_vllm
def test_a_seed_means_the_same_text(engine: Any, ask: Any) -> None:
    wish = Sampling(max_tokens=24, temperature=1.0, top_p=0.95, seed=7)
    prompt = engine.encode("hello")
    first, other, again = ask(engine, (prompt, wish), (prompt, replace(wish, seed=8)), (prompt, wish))
    assert text_of(first) == text_of(again) != text_of(other)


@integration
@needs_vllm
def test_logprobs_do_not_know_the_temperature(engine: Any, ask: Any) -> None:
    """At temperature 2 the chosen token's is still that of the model's own distribution."""
    wish = Sampling(max_tokens=8, temperature=2.0, seed=1, logprobs=20)
    (deltas,) = ask(engine, (engine.encode("hello"), wish))
    first = next(one for delta in deltas for one in delta.logprobs)
    (plain,) = ask(engine, (engine.encode("hello"), replace(wish, temperature=0.0)))
    same = next(one for delta in plain for one in delta.logprobs)
    assert [alt.logprob for alt in first.top] == pytest.approx([alt.logprob for alt in same.top], abs=1e-4)
    assert sum(math.exp(alt.logprob) for alt in first.top) < 1 + 1e-4


@integration
@needs_vllm
def test_a_reader_that_goes_away_frees_its_place(engine: Any, ask: Any) -> None:
    async def leave() -> None:
        async with aclosing(engine.generate(engine.encode("hello"), Sampling(max_tokens=490, seed=3))) as deltas:
            await anext(deltas)
            assert engine.load.running == 1

    asyncio.run(leave())
    deadline = time.monotonic() + 10
    while (engine.load != Load(0, 0) or engine._inner.get_num_unfinished_requests()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert engine.load == Load(0, 0)
    assert engine._inner.get_num_unfinished_requests() == 0
    assert ask(engine, (engine.encode("sky"), GREEDY))[0][-1].finish_reason is not None


@integration
@needs_vllm
def test_it_does_not_score(engine: Any) -> None:
    with pytest.raises(UnsupportedError, match="use the transformers engine"):
        engine.score([1, 2], np.zeros((2, 1), int))
