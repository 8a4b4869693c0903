"""The engine without a model keeps the others' promises."""

import asyncio
import math
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from cluster.errors import UserError
from serving.engines import open_engine
from serving.engines.base import Load, Refused, Sampling, UnsupportedError
from serving.engines.echo import EchoEngine


def test_it_answers_with_the_prompt(ask: Any) -> None:
    engine = open_engine("echo", None)
    (deltas,) = ask(engine, (engine.encode("héllo "), Sampling(max_tokens=10)))
    assert "".join(delta.text for delta in deltas) == "héllo hé"[:9]
    assert (deltas[-1].finish_reason, deltas[-1].completion_tokens) == ("length", 10)


def test_it_honours_stop_and_logprobs(ask: Any) -> None:
    engine = EchoEngine()
    (deltas,) = ask(engine, (engine.encode("abcd"), Sampling(max_tokens=10, stop=("cd",), logprobs=2)))
    assert "".join(delta.text for delta in deltas) == "ab"
    assert deltas[-1].finish_reason == "stop"
    told = [one for delta in deltas for one in delta.logprobs]
    assert [one.token for one in told] == ["a", "b"]
    assert [len(one.top) for one in told] == [2, 2]
    assert told[0].logprob == pytest.approx(-math.log(257))


def test_chats_prompts_and_tokens_are_checked_like_a_model_s() -> None:
    engine = EchoEngine()
    assert engine.encode_chat([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]) == [97, 10, 98]
    with pytest.raises(Refused, match="prompt is empty"):
        engine.encode("")
    with pytest.raises(Refused, match="Token id 257 is outside"):
        engine.check_tokens([256, 257])
    with pytest.raises(UnsupportedError, match="no model to score with"):
        engine.score([1], np.zeros((1, 1), int))


def test_who_leaves_frees_a_place_and_who_waits_is_counted() -> None:
    engine = EchoEngine(slots=1)

    async def scenario() -> None:
        async with aclosing(engine.generate([97], Sampling(max_tokens=1000))) as deltas:
            await anext(deltas)
            waiting = asyncio.create_task(anext(engine.generate([98], Sampling(max_tokens=1))))
            await asyncio.sleep(0)
            assert engine.load == Load(1, 1)
        assert (await waiting).text == "b"

    asyncio.run(scenario())


def test_an_unknown_engine_is_the_user_s_mistake() -> None:
    with pytest.raises(UserError, match=r"engine 'sglang' is not known; allowed: transformers, vllm, echo\."):
        open_engine("sglang", None)
