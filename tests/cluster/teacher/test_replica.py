"""Whether a failed call means that the replica is gone, or that the model fails on what it was given."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    RayTaskError,
    WorkerCrashedError,
)

from cluster.teacher import replica
from cluster.teacher.replica import ReplicaLostError, is_loss

MODEL = RayTaskError("score", "traceback", ValueError("not finite"))
PEER = RayTaskError("score", "traceback", RuntimeError("connection reset by peer"))


@pytest.mark.parametrize(
    "error",
    [
        ActorDiedError(),
        ActorUnavailableError("away", b"0" * 16),
        NodeDiedError("gone"),
        WorkerCrashedError(),
        ObjectLostError("00", "address", "stack"),
        ReplicaLostError("silent"),
        TimeoutError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_dies_is_a_loss(error: Exception) -> None:
    assert is_loss(error)


def test_what_the_model_raises_is_none() -> None:
    assert not is_loss(MODEL)
    assert not is_loss(ValueError("of our own"))


def answers(*given: tuple[float | None, Any]) -> Any:
    """Calls on shards: each answers after some seconds, with an error or a value, or never."""

    async def all_of_them() -> Any:
        loop = asyncio.get_running_loop()
        calls: list[asyncio.Future[Any]] = []
        for after_s, answer in given:
            call = loop.create_future()
            calls.append(call)
            give: Callable[[Any], None] = call.set_exception if isinstance(answer, Exception) else call.set_result
            if after_s is not None:
                loop.call_later(after_s, give, answer)
        return await replica._all_or_death(calls)  # type: ignore[arg-type]

    return asyncio.run(all_of_them())


def test_a_death_is_raised_before_what_it_did_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "DEATH_GRACE_S", 0.5)
    with pytest.raises(ActorDiedError):
        answers((0.0, PEER), (0.05, ActorDiedError()))


def test_a_shard_that_does_not_answer_while_another_fails_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "DEATH_GRACE_S", 0.1)
    with pytest.raises(ReplicaLostError, match=r"1 of its shards do not answer; another says .*reset by peer"):
        answers((0.0, PEER), (None, None))


def test_when_all_answer_the_model_has_failed() -> None:
    with pytest.raises(RayTaskError) as raised:
        answers((0.0, MODEL), (0.05, 1))
    assert not is_loss(raised.value)


def test_results_come_in_the_order_of_the_shards() -> None:
    assert answers((0.05, 1), (0.0, 2)) == [1, 2]
