"""What a pool that is in a student's place does with the work it has: nothing is lost, and no cluster is needed."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import ray

from cluster.capacity import Need
from cluster.errors import RunError, UserError
from cluster.limits import Most
from cluster.models import TeacherModel
from cluster.spec import ReplicaRange, TeacherSpec, TopKLabels
from cluster.teacher import pool as module
from cluster.teacher.pool import TeacherPool
from cluster.teacher.replica import Replica
from cluster.teacher.scaling import Demand, Pace

QUICK = Pace(look_s=0.01, grow_s=0.05, idle_s=60.0)
STUDENT = Need("student a", 1, 1.0, 0.0)
OTHER = Need("the teacher", 2, 1.0, 0.0)


def full_pool(least: int, most: int) -> TeacherPool:
    """A pool at its most, of replicas that have no processes; somebody always waits for it."""
    spec = TeacherSpec(model="teacher", replicas=ReplicaRange(min=least, max=most))
    labels, model = TopKLabels(k=8), TeacherModel("teacher", 300, "aa" * 8, "bb" * 8)
    pool = TeacherPool(spec, labels, model, 1, Demand(lambda: True, lambda: [STUDENT], lambda: None), QUICK)
    pool._replicas += [next(pool._new) for _ in range(most - least)]
    for replica in pool._replicas:
        pool._serve(replica, 0.0)
    return pool


def test_a_replica_in_a_student_s_place_goes_when_it_has_done_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    # The student fits beside one replica.
    monkeypatch.setattr(module, "_fits_beside", lambda students, replicas: len(replicas) <= 1)

    async def work_on() -> tuple[TeacherPool, list[int], list[int]]:
        pool = full_pool(1, 3)
        finish, sizes = asyncio.Event(), []

        async def work(_: Replica) -> int:
            await finish.wait()
            # Long enough for a look or two at the pool.
            await asyncio.sleep(0.02)
            return 1

        following = asyncio.ensure_future(pool._follow())
        calls = [asyncio.ensure_future(pool._run("work", work)) for _ in range(60)]
        await asyncio.sleep(0.3)
        sizes.append(pool.size)  # all are busy, so none has gone yet
        finish.set()
        results = await asyncio.wait_for(asyncio.gather(*calls), 60.0)
        sizes.append(pool.size)
        following.cancel()
        return pool, sizes, results

    pool, sizes, results = asyncio.run(work_on())
    assert results == [1] * 60
    assert sizes == [3, 1]
    assert (pool.stats.ready, pool.stats.shrunk, pool.stats.rescored, pool.stats.lost) == (1, 2, 0, 0)


def test_when_the_nodes_cannot_be_asked_for_the_pool_stays_and_is_followed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def away(*given: Any) -> bool:
        asked.append(given)
        if len(asked) <= 3:
            raise ConnectionError("away")
        return False

    monkeypatch.setattr(module, "_fits_beside", away)

    async def follow() -> TeacherPool:
        pool = full_pool(1, 2)
        following = asyncio.ensure_future(pool._follow())
        async with asyncio.timeout(60.0):
            while pool.size > 1 and not following.done():
                await asyncio.sleep(0.01)
        following.cancel()
        return pool

    pool = asyncio.run(follow())
    assert pool.size == 1
    assert len(asked) > 3


@pytest.mark.parametrize(("cpus", "may"), [(2.9, False), (3.0, True)])
def test_a_pool_does_not_grow_past_what_the_family_may_hold(cpus: float, may: bool) -> None:
    async def ask() -> bool:
        spec = TeacherSpec(model="teacher", replicas=ReplicaRange(min=1, max=2))
        labels, model = TopKLabels(k=8), TeacherModel("teacher", 300, "aa" * 8, "bb" * 8)
        # One replica, another one and the student, each of one CPU.
        demand = Demand(lambda: True, lambda: [STUDENT], lambda: None, most=Most(cpus=cpus))
        return TeacherPool(spec, labels, model, 1, demand, QUICK)._may_grow()

    assert asyncio.run(ask()) is may


def test_what_other_families_need_counts_like_a_student_s_place(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[Need]] = []
    monkeypatch.setattr(module, "_fits_beside", lambda needs, replicas: not asked.append(needs))

    async def ask() -> bool:
        pool = full_pool(1, 2)
        pool._demand = Demand(lambda: True, lambda: [STUDENT], lambda: None, lambda: [OTHER])
        return await pool._is_crowded()

    assert asyncio.run(ask()) is False
    assert asked == [[STUDENT, OTHER]]


class Starts:
    """Instead of a replica's start: fails some times with an error, then answers the probe."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.left, self.tries = error, times, 0

    async def start(self, _: Replica) -> np.ndarray:
        self.tries += 1
        if self.left:
            self.left -= 1
            # As a shard's error arrives.
            raise ray.exceptions.RayTaskError("join", "", self.error)
        return np.ones(4)


def started(monkeypatch: pytest.MonkeyPatch, starts: Starts, restarts: int) -> TeacherPool:
    """A pool of one replica after it has started, or cannot."""
    monkeypatch.setattr(Replica, "start", lambda replica: starts.start(replica))
    monkeypatch.setattr(module, "AGAIN_S", 0.0)

    async def start() -> TeacherPool:
        spec = TeacherSpec(model="teacher", max_restarts=restarts, dtype="float32")
        pool = TeacherPool(spec, TopKLabels(k=8), TeacherModel("teacher", 300, "aa" * 8, "bb" * 8), 1)
        pool.start()
        async with asyncio.timeout(60.0):
            while not pool.failed and not pool.stats.ready:
                await asyncio.sleep(0)
        return pool

    return asyncio.run(start())


PASSING = [
    FileNotFoundError("model.safetensors: no such file"),
    OSError("teacher does not appear to have a file named config.json"),
    RunError("teacher is not on the node worker-1"),
    RuntimeError("The server socket has failed to listen: EADDRINUSE"),
]


@pytest.mark.parametrize("error", PASSING, ids=str)
def test_a_replica_whose_start_fails_for_a_passing_reason_is_started_again(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    pool = started(monkeypatch, Starts(error, times=2), restarts=3)
    assert (pool.failed, pool.stats.ready, pool.stats.restarts) == (False, 1, 2)
    assert str(error) in pool.stats.last_error


def test_a_reason_that_does_not_pass_ends_the_pool_after_its_restarts_with_the_cause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    starts = Starts(PASSING[0], times=9)
    pool = started(monkeypatch, starts, restarts=2)
    assert (pool.failed, starts.tries) == (True, 3)
    said = "teacher replica 0 failed to start 3 times, which is more than teacher.max_restarts 2; the last time: File"
    assert said in pool.stats.last_error and "no such file" in pool.stats.last_error


@pytest.mark.parametrize("error", [UserError("no such model"), ValueError("no such type"), KeyError("x")], ids=repr)
def test_a_model_that_cannot_be_loaded_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    starts = Starts(error, times=9)
    pool = started(monkeypatch, starts, restarts=3)
    assert (pool.failed, starts.tries) == (True, 1)
    assert "cannot start" in pool.stats.last_error
