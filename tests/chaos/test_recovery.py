"""How long a batch takes to be scored again when its replica is killed over it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from cluster.corpus.batches import Batch, content_address
from cluster.teacher.pool import TeacherPool
from tests.chaos.report import ChaosReport
from tests.integration.test_teacher_pool import pool_of, read
from tests.processes import own_processes
from tests.tiny import VOCABULARY

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
# Enough work for the tiny teacher that it is still at it when it is killed.
SEQUENCES, LENGTH = 64, 256
HALFWAY_S = 0.2


def large_batch() -> Batch:
    tokens_BS = np.random.default_rng(0).integers(0, VOCABULARY, (SEQUENCES, LENGTH), dtype=np.int32)
    positions_BS = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens_BS.shape)
    return Batch(0, tokens_BS, np.ones(tokens_BS.shape, dtype=np.bool_), positions_BS, content_address(tokens_BS))


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_batch_whose_replica_is_killed_is_scored_again(tiny: Path, replicas: int, report: ChaosReport) -> None:
    async def kill_over_it() -> tuple[list[np.ndarray], list[np.ndarray], float, TeacherPool]:
        pool = pool_of(tiny, replicas=replicas)
        pool.start()
        async with asyncio.timeout(300):
            while pool.stats.ready < replicas:
                await asyncio.sleep(0.1)
        before = [await ref for ref in await pool.score(large_batch())]
        scoring = asyncio.ensure_future(pool.score(large_batch()))
        await asyncio.sleep(HALFWAY_S)
        busy = own_processes("Shard.score")
        os.kill(busy[0].pid, signal.SIGKILL)
        killed = time.monotonic()
        after = [await ref for ref in await scoring]
        seconds = time.monotonic() - killed
        pool.stop()
        return before, after, seconds, pool

    before, after, seconds, pool = asyncio.run(kill_over_it())
    others = "no other replica" if replicas == 1 else "another replica idle"
    report.took(f"a replica killed to its batch scored again, {others}", seconds)
    assert pool.stats.rescored == 1
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))
    assert len(read(after).ids_TK) == SEQUENCES * LENGTH
