"""A pool that follows the students, on real Ray actors: it grows, shrinks, and loses nothing over either."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from cluster.capacity import Need
from cluster.family import run_family
from cluster.models import TeacherModel
from cluster.preflight import preflight
from cluster.runs import open_run
from cluster.spec import ReplicaRange, TeacherSpec
from cluster.specfile import load_spec
from cluster.teacher.pool import TeacherPool
from cluster.teacher.scaling import Demand, Pace
from cluster.watch import Status
from tests.integration.test_teacher_pool import LABELS, a_batch, read, score, shard_processes
from tests.tiny import VOCABULARY, write_family, write_tiny_model

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]
QUICK = Pace(look_s=0.1, grow_s=1.0, idle_s=1.0, place_s=2, retry_s=1.0, retry_most_s=2.0)
CALLERS = 3
ENOUGH_S = 120.0
CPUS = 0.2


def elastic(teacher: Path, demand: Demand | None = None, **settings: Any) -> TeacherPool:
    given = {"replicas": ReplicaRange(min=1, max=2), "dtype": "float32", "cpus_per_shard": CPUS, **settings}
    spec = TeacherSpec(model=str(teacher), **given)
    model = TeacherModel(spec.model, VOCABULARY, "aa" * 8, "bb" * 8)
    pool = TeacherPool(spec, LABELS, model, 2, demand, QUICK)
    pool.start()
    return pool


async def idly_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(ENOUGH_S):
        while not condition():
            await asyncio.sleep(0.05)


async def under_load_until(pool: TeacherPool, condition: Callable[[], bool], scored: list[Any] | None = None) -> None:
    """More calls than there are replicas, each followed by the next, until something has happened."""

    async def call() -> None:
        while not condition():
            # In threads, for a fetched block would otherwise hold this loop up.
            blocks = await pool.score(a_batch(7))
            if scored is not None:
                scored.append(blocks)

    async with asyncio.timeout(ENOUGH_S):
        await asyncio.gather(*(call() for _ in range(CALLERS)))


def test_a_pool_grows_while_calls_queue_up_and_shrinks_when_none_come(tiny: Path) -> None:
    async def follow() -> TeacherPool:
        pool = elastic(tiny / "teacher")
        try:
            before = await score(pool, 7)
            scored: list[Any] = []
            await under_load_until(pool, lambda: pool.stats.ready == 2, scored)
            assert pool.size == 2
            assert len(shard_processes()) == 2
            already = len(scored)
            await under_load_until(pool, lambda: len(scored) > already + 20, scored)
            for blocks in (scored[0], scored[-1]):
                after = read(await asyncio.to_thread(ray.get, blocks))
                np.testing.assert_array_equal(after.codes_TK, before.codes_TK)
            await idly_until(lambda: pool.size == 1)
            await idly_until(lambda: len(shard_processes()) == 1)
            np.testing.assert_array_equal((await score(pool, 7)).codes_TK, before.codes_TK)
        finally:
            pool.stop()
        return pool

    stats = asyncio.run(follow()).stats
    assert (stats.ready, stats.grown, stats.shrunk, stats.lost, stats.restarts, stats.rescored) == (1, 1, 1, 0, 0, 0)


@pytest.mark.nightly
def test_a_replica_above_the_least_may_die_and_is_not_counted_as_a_restart(tiny: Path) -> None:
    async def lose_one() -> TeacherPool:
        pool = elastic(tiny / "teacher", max_restarts=0)
        try:
            await under_load_until(pool, lambda: pool.stats.ready == 2)
            os.kill(shard_processes()[0].pid, signal.SIGKILL)
            await under_load_until(pool, lambda: pool.stats.lost == 1)
            assert pool.size == 1
            assert not pool.failed
            await under_load_until(pool, lambda: pool.stats.ready == 2)
        finally:
            pool.stop()
        return pool

    stats = asyncio.run(lose_one()).stats
    assert (stats.grown, stats.lost, stats.restarts, stats.rescored) == (2, 1, 0, 1)


def test_a_new_replica_that_says_something_else_never_serves(tiny: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny / "teacher", teacher)

    async def exchange_the_weights() -> TeacherPool:
        pool = elastic(teacher)
        try:
            before = await score(pool, 7)
            write_tiny_model(teacher, seed=1)
            sizes: set[int] = set()

            def refused() -> bool:
                sizes.add(pool.size)
                return pool._scaling._failures == 1

            scored: list[Any] = []
            await under_load_until(pool, refused, scored)
            assert sizes == {1}
            await idly_until(lambda: len(shard_processes()) == 1)
            for blocks in scored[:: max(1, len(scored) // 20)]:
                np.testing.assert_array_equal(read(await asyncio.to_thread(ray.get, blocks)).codes_TK, before.codes_TK)
        finally:
            pool.stop()
        return pool

    pool = asyncio.run(exchange_the_weights())
    assert "disagrees with the pool on the probe text" in pool.stats.last_error
    assert (pool.stats.ready, pool.stats.grown, pool.failed) == (1, 0, False)


@pytest.mark.nightly
def test_it_grows_when_there_is_room_and_not_before(tiny: Path) -> None:
    # Of all that the cluster has, not of what is free at the moment: an earlier test's processes may be still ending.
    others = placement_group([{"CPU": ray.cluster_resources()["CPU"] - CPUS - CPUS / 2}])

    async def wait_for_room() -> None:
        assert await asyncio.to_thread(others.wait, 60)
        pool = elastic(tiny / "teacher")
        try:
            await under_load_until(pool, lambda: pool.stats.ready == 1)
            deadline = asyncio.get_running_loop().time() + 6 * QUICK.grow_s
            await under_load_until(pool, lambda: asyncio.get_running_loop().time() > deadline)
            assert (pool.size, pool.stats.grown, pool.stats.last_error) == (1, 0, "")
            remove_placement_group(others)
            await under_load_until(pool, lambda: pool.stats.ready == 2)
        finally:
            pool.stop()

    try:
        asyncio.run(wait_for_room())
    finally:
        remove_placement_group(others)


@pytest.mark.nightly
def test_it_leaves_the_students_room_to_be_started_again(tiny: Path) -> None:
    async def beside_students() -> None:
        # All that one replica leaves is a student's, which holds nothing of it at the moment.
        students = [Need("student a", 1, ray.cluster_resources()["CPU"] - CPUS, 0.0)]
        pool: TeacherPool
        pool = elastic(tiny / "teacher", Demand(lambda: pool.queued > 0, lambda: students, lambda: None))
        try:
            await under_load_until(pool, lambda: pool.stats.ready == 1)
            deadline = asyncio.get_running_loop().time() + 6 * QUICK.grow_s
            await under_load_until(pool, lambda: asyncio.get_running_loop().time() > deadline)
            assert (pool.size, pool.stats.grown, pool.stats.last_error) == (1, 0, "")
            students.clear()
            await under_load_until(pool, lambda: pool.stats.ready == 2)
        finally:
            pool.stop()

    asyncio.run(beside_students())


@pytest.mark.slow
@pytest.mark.nightly
def test_a_family_s_pool_grows_and_its_metrics_show_it(tiny: Path, tmp_path: Path) -> None:
    path = write_family(
        tmp_path,
        tiny,
        # One token at a time makes the teacher slower than its student.
        teacher={"replicas": {"min": 1, "max": 2}, "tokens_per_chunk": 1},
        corpus={"max_batches": 450, "epochs": 90, "sequence_length": 128, "batch_sequences": 8, "held_out": 0.2},
        students={"small": {"init": {"source": "teacher", "layers": 1}, "precision": "float32", "micro_batch": 8}},
        evaluation={"batches": 1, "angle_every": None},
    )
    checked = preflight(load_spec(path))
    seen: list[Status] = []
    result = run_family(checked, open_run(checked.spec, False), seen.append, QUICK)
    assert result.failed == {}
    assert sorted(result.stats.scored.items()) == [(number, 1) for number in range(result.stats.total)]
    assert max(status.stats.pool.ready for status in seen if status.stats) == 2
    client = mlflow.MlflowClient(checked.tracking_uri)
    curve = client.get_metric_history(result.run.mlflow[""], "teacher/replicas_ready")
    assert 2 in [point.value for point in curve]
    assert all(later.step >= earlier.step for earlier, later in itertools.pairwise(curve))
    for name in ("stream/window_used", "stream/unsaved", "stream/behind/small", "stream/waited_s/small"):
        history = client.get_metric_history(result.run.mlflow[""], name)
        assert history, name
    assert client.get_metric_history(result.run.mlflow[""], "stream/waited_s/small")[-1].value > 0
