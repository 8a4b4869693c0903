"""The teacher pool on real Ray actors: tensor parallel equals one process, and a dead replica is replaced."""

from __future__ import annotations

import asyncio
import gc
import logging
import shutil
import socket
import time
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
import ray

from cluster.corpus.batches import Batch, content_address
from cluster.errors import RunError
from cluster.labels.kinds import TopK, joined
from cluster.labels.wire import decode
from cluster.models import TeacherModel
from cluster.spec import TeacherSpec, TopKLabels
from cluster.teacher import replica as replica_module
from cluster.teacher.pool import TeacherPool
from cluster.teacher.shard import Shard
from tests.processes import own_processes
from tests.tiny import VOCABULARY

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]
LABELS = TopKLabels(k=8)
UNSEEN_S = 6.0
T = TypeVar("T")


def a_batch(number: int = 0) -> Batch:
    tokens_BS = np.random.default_rng(number).integers(0, VOCABULARY, (4, 32), dtype=np.int32)
    positions_BS = np.broadcast_to(np.arange(32, dtype=np.int32), tokens_BS.shape)
    return Batch(number, tokens_BS, np.ones(tokens_BS.shape, dtype=np.bool_), positions_BS, content_address(tokens_BS))


def pool_of(tiny: Path, **settings: Any) -> TeacherPool:
    spec = TeacherSpec(model=str(tiny / "teacher"), dtype="float32", cpus_per_shard=0.2, **settings)
    return TeacherPool(spec, LABELS, TeacherModel(spec.model, VOCABULARY, "aa" * 8, "bb" * 8), blocks=2)


def shard_processes() -> list[psutil.Process]:
    return own_processes("Shard")


class Running:
    """A pool that several tests share, the event loop that it lives in, and the processes that it began with."""

    def __init__(self, tiny: Path, replicas: int = 1, **settings: Any) -> None:
        self._runner = asyncio.Runner()
        others = set(shard_processes())
        self.pool = self.run(self._started(tiny, replicas, settings))
        self.processes = [process for process in shard_processes() if process not in others]

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    async def _started(self, tiny: Path, replicas: int, settings: dict[str, Any]) -> TeacherPool:
        pool = pool_of(tiny, replicas=replicas, **settings)
        pool.start()
        async with asyncio.timeout(300):
            while pool.stats.ready < replicas:
                await asyncio.sleep(0.05)
        return pool

    async def _stop(self) -> None:
        self.pool.stop()

    def stop(self) -> None:
        self.run(self._stop())
        self._runner.close()


@pytest.fixture(scope="module")
def unsharded(tiny: Path) -> Iterator[Running]:
    """One replica of one shard."""
    running = Running(tiny)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def sharded(tiny: Path) -> Iterator[Running]:
    """One replica of two shards."""
    running = Running(tiny, shards=2)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def two_replicas(tiny: Path) -> Iterator[Running]:
    """Two replicas that are not replaced."""
    running = Running(tiny, replicas=2, max_restarts=0)
    yield running
    running.stop()


async def score(pool: TeacherPool, number: int = 0) -> TopK:
    blocks = await pool.score(a_batch(number))
    return read([await ref for ref in blocks])


def read(blocks: list[np.ndarray]) -> TopK:
    labels = joined([decode(block)[0] for block in blocks])
    assert isinstance(labels, TopK)
    return labels


def test_two_shards_give_the_labels_of_one_process(unsharded: Running, sharded: Running) -> None:
    one, head_one = unsharded.run(score(unsharded.pool)), unsharded.run(unsharded.pool.head())
    two, head_two = sharded.run(score(sharded.pool)), sharded.run(sharded.pool.head())
    assert (len(unsharded.processes), len(sharded.processes)) == (1, 2)
    assert one.ids_TK.shape == (4 * 32, LABELS.k)
    np.testing.assert_array_equal(one.ids_TK, two.ids_TK)
    np.testing.assert_allclose(one.buckets()[0], two.buckets()[0], atol=5e-4)  # and the rounding of 16 bits
    np.testing.assert_allclose(one.log_tail_T, two.log_tail_T, atol=1e-4)
    assert head_one.weight_VD.shape == (VOCABULARY, 64)
    np.testing.assert_array_equal(head_one.weight_VD, head_two.weight_VD)


@pytest.mark.nightly
def test_weights_that_appear_late_are_waited_for(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "teacher", tmp_path / "teacher", ignore=shutil.ignore_patterns("*.safetensors"))

    async def appear_late() -> tuple[TopK, TeacherPool]:
        pool = pool_of(tmp_path)
        pool.start()
        async with asyncio.timeout(300):
            while not pool.stats.restarts:
                await asyncio.sleep(0.05)
        assert "model.safetensors" in pool.stats.last_error
        # As a copy over a slow disk ends: whole at once.
        shutil.copy(tiny / "teacher" / "model.safetensors", tmp_path / "half")
        (tmp_path / "half").rename(tmp_path / "teacher" / "model.safetensors")
        try:
            return await score(pool), pool
        finally:
            pool.stop()

    labels, pool = asyncio.run(appear_late())
    assert np.isfinite(labels.buckets()[0]).all()
    assert pool.stats.restarts >= 1 and not pool.failed


class TakenPort(Shard):
    """A shard whose port is taken the first time."""

    def free_address(self) -> tuple[str, int]:
        """An address at which another process listens, and then one that is free."""
        host, port = super().free_address()
        taken = Path(self._teacher.folder).with_name("taken")
        if taken.exists():
            port = int(taken.read_text())
            taken.unlink()
        return host, port


@pytest.mark.nightly
def test_a_port_that_is_taken_is_tried_again(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_module, "Shard", TakenPort)
    shutil.copytree(tiny / "teacher", tmp_path / "teacher")
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        (tmp_path / "taken").write_text(str(other.getsockname()[1]))

        async def start() -> tuple[TopK, TeacherPool]:
            pool = pool_of(tmp_path, shards=2)
            pool.start()
            try:
                return await score(pool), pool
            finally:
                pool.stop()

        _, pool = asyncio.run(start())
    assert pool.stats.restarts == 1 and not pool.failed


def test_a_failed_call_is_reported_once(
    unsharded: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last to use this pool: it has failed for good."""
    monkeypatch.setattr(logging.getLogger("ray"), "propagate", True)  # or nothing of Ray's would be in caplog

    batch = replace(a_batch(), tokens_BS=np.full((4, 32), 10**6, dtype=np.int32))
    with pytest.raises(RunError, match="the teacher failed on batch 0: batch 0 holds token 1000000"):
        unsharded.run(unsharded.pool.score(batch))
    # Ray logs the error of a result that is dropped before anyone has looked at it, after five seconds at the latest.
    time.sleep(UNSEEN_S)
    gc.collect()
    logging.getLogger("ray.here").error("Ray's messages are seen here")
    assert "Ray's messages are seen here" in caplog.text and "Unhandled error" not in caplog.text


def test_a_killed_shard_is_replaced_and_its_batch_scored_again(sharded: Running) -> None:
    before = sharded.run(score(sharded.pool))
    sharded.processes[-1].kill()
    after = sharded.run(score(sharded.pool))
    assert (sharded.pool.stats.restarts, sharded.pool.stats.rescored) == (1, 1)
    np.testing.assert_array_equal(before.ids_TK, after.ids_TK)
    np.testing.assert_array_equal(before.codes_TK, after.codes_TK)


def test_two_replicas_share_the_batches(two_replicas: Running) -> None:
    pool = two_replicas.pool

    async def both_at_work() -> tuple[int, int, list[TopK]]:
        idle_before = pool._idle.qsize()
        scoring = [asyncio.ensure_future(score(pool, 7)) for _ in range(2)]
        await asyncio.sleep(0)  # each takes a replica and waits for it
        await asyncio.sleep(0)
        idle_during = pool._idle.qsize()
        return idle_before, idle_during, await asyncio.gather(*scoring)

    idle_before, idle_during, (one, other) = two_replicas.run(both_at_work())
    assert (idle_before, idle_during) == (2, 0)
    np.testing.assert_array_equal(one.codes_TK, other.codes_TK)


def test_a_replica_that_keeps_dying_is_given_up_while_another_serves(two_replicas: Running) -> None:
    pool = two_replicas.pool

    async def one_is_left() -> tuple[TopK, TopK]:
        first, second = two_replicas.processes
        before = await score(pool, 7)
        first.kill()
        async with asyncio.timeout(300):
            while pool.size > 1:
                # Whoever is dead is found when it is its turn.
                await score(pool, 7)
        after = await score(pool, 7)
        second.kill()
        with pytest.raises(RunError, match=r"died 1 times, which is more than teacher.max_restarts 0.*--resume"):
            await score(pool, 7)
        return before, after

    before, after = two_replicas.run(one_is_left())
    np.testing.assert_array_equal(before.codes_TK, after.codes_TK)
    assert (pool.stats.lost, pool.stats.restarts) == (1, 0)


@pytest.mark.nightly
def test_a_teacher_whose_output_is_not_finite_is_refused(tiny: Path, tmp_path: Path) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny / "teacher", tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    state = load_file(weights)
    state["lm_head.weight"] = torch.full_like(state["lm_head.weight"], float("nan"))
    save_file(state, weights, metadata={"format": "pt"})

    async def try_it() -> None:
        spec = TeacherSpec(model=str(tmp_path / "broken"), dtype="float32", cpus_per_shard=0.2)
        pool = TeacherPool(spec, LABELS, TeacherModel(spec.model, VOCABULARY, "aa" * 8, "bb" * 8), blocks=1)
        pool.start()
        try:
            await pool.score(a_batch())
        finally:
            pool.stop()

    with pytest.raises(RunError, match="not finite"):
        asyncio.run(try_it())


def test_blocks_outlive_the_replica_that_made_them(sharded: Running) -> None:
    """Comes last: it stops the pool that others share."""

    async def read_after_stop() -> TopK:
        blocks = await sharded.pool.score(a_batch())
        sharded.pool.stop()
        await asyncio.sleep(1)
        return read(await asyncio.to_thread(ray.get, blocks))

    assert np.isfinite(sharded.run(read_after_stop()).codes_TK).all()
