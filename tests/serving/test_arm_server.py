"""An arm's answers and its health, with a real model and no Serve around it."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.arm_server import ArmServer
from serving.engine import Accepted, Delta, Refused, Sampling

GREEDY = Sampling(max_tokens=5, temperature=0)


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> ArmServer:
    return ArmServer(tiny_model, dtype="float32", threads=1)


def collect(answer: AsyncIterator[Any]) -> list[Any]:
    async def all_of_it() -> list[Any]:
        return [item async for item in answer]

    return asyncio.run(all_of_it())


def test_acceptance_comes_first_then_the_text(server: ArmServer) -> None:
    accepted, *deltas = collect(server.complete("hello", GREEDY))
    assert accepted == Accepted(5)
    assert all(isinstance(delta, Delta) for delta in deltas)
    assert deltas[-1].finish_reason in ("stop", "length")
    # Token ids are taken as they are: the same prompt, the same answer.
    assert collect(server.complete(server._engine.encode("hello"), GREEDY)) == [accepted, *deltas]


def test_no_limit_is_the_rest_of_the_context(server: ArmServer) -> None:
    accepted, *deltas = collect(server.chat([{"role": "user", "content": "a" * 490}], Sampling(temperature=0)))
    assert accepted == Accepted(493)
    last = deltas[-1]
    assert last.finish_reason == "stop" or last.completion_tokens == 512 - 493


def test_a_refusal_is_an_item_and_not_an_exception(server: ArmServer) -> None:
    (refused,) = collect(server.chat([{"role": "user", "content": "a" * 510}], GREEDY))
    assert isinstance(refused, Refused)
    assert (refused.param, refused.code) == ("messages", "context_length_exceeded")


def test_cancelling_ends_the_generation(server: ArmServer, monkeypatch: pytest.MonkeyPatch) -> None:
    generated: list[Delta] = []
    finished = threading.Event()
    real = server._engine.generate

    def watched(*arguments: Any) -> Iterator[Delta]:
        for delta in real(*arguments):
            generated.append(delta)
            yield delta
        finished.set()

    async def leave_after_the_first_piece() -> None:
        answer = server.complete("hello", Sampling(max_tokens=500, temperature=1, seed=1))
        async for item in answer:
            if isinstance(item, Delta):
                break
        await answer.aclose()  # type: ignore[attr-defined]
        assert await asyncio.to_thread(finished.wait, 30)

    whole = collect(server.complete("hello", Sampling(max_tokens=500, temperature=1, seed=1)))[-1]
    monkeypatch.setattr(server._engine, "generate", watched)
    asyncio.run(leave_after_the_first_piece())
    assert generated[-1].finish_reason is None
    assert generated[-1].completion_tokens < whole.completion_tokens / 2


def test_after_an_error_the_engine_has_to_prove_itself(server: ArmServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("device lost")
        yield

    server.check_health()
    with monkeypatch.context() as patch:
        patch.setattr(server._engine, "generate", broken)
        server.check_health()  # nothing has gone wrong yet: costs nothing, notices nothing
        with pytest.raises(RuntimeError, match="device lost"):
            collect(server.complete("hello", GREEDY))
        for _ in range(2):
            with pytest.raises(RuntimeError, match="device lost"):
                server.check_health()
    server.check_health()
    with monkeypatch.context() as patch:
        patch.setattr(server._engine, "generate", broken)
        server.check_health()  # proven again, so no longer under suspicion
