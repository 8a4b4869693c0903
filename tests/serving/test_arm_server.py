"""An arm's answers and its health, with a real model and no Serve around it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.arm_server import ArmServer
from serving.asking import Ask, Piece
from serving.engines.base import Accepted, Load, Refused, Sampling
from serving.records import Scored

GREEDY = Sampling(max_tokens=5, temperature=0)


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Any:
    return a_server(tiny_model)


def a_server(model: Path, **limits: int) -> Any:
    return ArmServer("transformers", model, dtype="float32", threads=1, slots=4, **limits)


def collect(answer: AsyncIterator[Any]) -> list[Any]:
    async def all_of_it() -> list[Any]:
        return [item for items in [items async for items in answer] for item in items]

    return asyncio.run(all_of_it())


def chat(size: int, sampling: Sampling = GREEDY) -> Ask:
    return Ask(sampling, messages=[{"role": "user", "content": "a" * size}])


def text_of(pieces: list[Piece], choice: int = 0) -> str:
    return "".join(piece.delta.text for piece in pieces if piece.choice == choice)


def test_acceptance_comes_first_then_the_text(server: Any) -> None:
    accepted, *pieces = collect(server.answer(Ask(GREEDY, prompt="hello")))
    assert accepted == Accepted(5)
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert pieces[-1].delta.finish_reason in ("stop", "length")
    # Token ids are taken as they are: the same prompt, the same answer.
    _, *again = collect(server.answer(Ask(GREEDY, prompt=server._engine.encode("hello"))))
    assert text_of(again) == text_of(pieces)


def test_an_answer_that_nobody_reads_along_comes_in_two_messages(server: Any) -> None:
    async def messages() -> list[list[Any]]:
        ask = Ask(Sampling(max_tokens=40, temperature=1, seed=1), prompt="hello", streamed=False)
        return [items async for items in server.answer(ask)]

    first, rest = asyncio.run(messages())
    assert isinstance(first[0], Accepted) and len(first) > 1  # with its first piece, whose time is taken
    assert rest[-1].delta.finish_reason is not None


def test_a_long_answer_that_nobody_reads_along_comes_some_at_a_time(server: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("serving.arm_server._MOST_PIECES", 10)
    monkeypatch.setattr(server._engine._model, "ends", frozenset())

    async def messages() -> list[list[Any]]:
        ask = Ask(Sampling(max_tokens=60, temperature=0), prompt="hello", streamed=False)
        return [items async for items in server.answer(ask)]

    _, *rest = asyncio.run(messages())
    assert len(rest) > 1 and all(len(items) == 10 for items in rest[:-1]) and 0 < len(rest[-1]) <= 10
    assert rest[-1][-1].delta.finish_reason is not None


def test_several_choices_are_drawn_each_by_itself(server: Any) -> None:
    def choices(count: int, seed: int) -> list[str]:
        ask = Ask(Sampling(max_tokens=20, temperature=1, seed=seed), prompt="hello", choices=count)
        _, *pieces = collect(server.answer(ask))
        assert sum(piece.delta.finish_reason is not None for piece in pieces) == count
        return [text_of(pieces, choice) for choice in range(count)]

    three = choices(3, seed=7)
    assert len(set(three)) == 3
    assert choices(3, seed=7) == three
    assert choices(1, seed=8)[0] == three[1]  # the next seed
    assert len(choices(2, seed=2**63 - 1)) == 2  # and behind the last one comes the first


def test_no_limit_is_the_rest_of_the_context(server: Any) -> None:
    accepted, *pieces = collect(server.answer(chat(490, Sampling(temperature=0))))
    assert accepted == Accepted(493)
    last = pieces[-1].delta
    assert last.finish_reason == "stop" or last.completion_tokens == 512 - 493


def test_a_refusal_is_an_item_and_not_an_exception(server: Any) -> None:
    (refused,) = collect(server.answer(chat(510)))
    assert isinstance(refused, Refused)
    assert (refused.param, refused.code) == ("messages", "context_length_exceeded")


def test_the_endpoint_s_own_limits(tiny_model: Path) -> None:
    server = a_server(tiny_model, prompt_limit=20, answer_limit=7)
    for ask, param, code in (
        (chat(30), "messages", "prompt_too_long"),
        (Ask(Sampling(max_tokens=8), prompt="a"), "max_tokens", "max_tokens"),
    ):
        (refused,) = collect(server.answer(ask))
        assert (refused.param, refused.code) == (param, code)
    _, *pieces = collect(server.answer(Ask(Sampling(temperature=1, seed=1), prompt="hello")))
    assert pieces[-1].delta.completion_tokens <= 7


def test_a_sampled_answer_ends_with_its_tokens_and_shows_no_log_probabilities(server: Any) -> None:
    ask = Ask(Sampling(max_tokens=10, temperature=0), prompt="hello", sampled=True)
    _, *pieces, scored = collect(server.answer(ask))
    assert isinstance(scored, Scored)
    assert scored.prompt_ids == tuple(server._engine.encode("hello"))
    assert scored.answer_ids
    assert not any(piece.delta.logprobs for piece in pieces)
    # Asked for as well, they are shown.
    _, *pieces, again = collect(server.answer(replace(ask, sampling=replace(ask.sampling, logprobs=1))))
    assert again == scored
    assert [token.token_id for piece in pieces for token in piece.delta.logprobs] == list(scored.answer_ids)


def test_scores_are_those_of_the_answer_s_own_log_probabilities(server: Any) -> None:
    ask = Ask(Sampling(max_tokens=10, temperature=0, logprobs=0), prompt="hello", sampled=True)
    _, *pieces, scored = collect(server.answer(ask))
    told = [token.logprob for piece in pieces for token in piece.delta.logprobs]
    ids = [*scored.prompt_ids, *scored.answer_ids]
    scores_T1 = asyncio.run(server.score(ids, np.array([*ids[1:], 0])[:, None]))
    begin = len(scored.prompt_ids) - 1
    np.testing.assert_allclose(scores_T1[begin : begin + len(told), 0], told, atol=1e-4)


def test_cancelling_ends_the_generation(server: Any) -> None:
    async def leave_after_the_first_piece() -> None:
        ask = Ask(Sampling(max_tokens=500, temperature=1, seed=1), prompt="hello", choices=3)
        async with aclosing(server.answer(ask)) as answer:
            await anext(answer)
            assert await server.under_way() == 3  # they would have gone on for hundreds of tokens
        deadline = time.monotonic() + 30
        while await server.under_way() and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert server._engine.load == Load(0, 0)

    asyncio.run(leave_after_the_first_piece())


def test_after_an_error_the_engine_has_to_prove_itself(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*args: Any) -> Any:
        raise RuntimeError("device lost")
        yield

    def check() -> None:
        asyncio.run(server.check_health())

    check()
    with monkeypatch.context() as patch:
        patch.setattr(server._engine, "generate", broken)
        check()  # nothing has gone wrong yet: costs nothing, notices nothing
        with pytest.raises(RuntimeError, match="device lost"):
            collect(server.answer(Ask(GREEDY, prompt="hello")))
        for _ in range(2):
            with pytest.raises(RuntimeError, match="device lost"):
                check()
    check()
    with monkeypatch.context() as patch:
        patch.setattr(server._engine, "generate", broken)
        check()  # proven again, so no longer under suspicion
