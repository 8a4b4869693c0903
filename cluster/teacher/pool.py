"""R interchangeable replicas: hands batches to whichever is idle and replaces the ones that die."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import ray

from cluster.corpus.batches import Batch
from cluster.errors import RunError
from cluster.models import TeacherModel
from cluster.spec import LabelsSpec, TeacherSpec
from cluster.teacher.replica import Replica, first_line, is_loss

log = logging.getLogger(__name__)

T = TypeVar("T")

# Largest difference in probability between two replicas on the probe text. The same weights in bfloat16 on other
# hardware differ by rounding; a half-loaded teacher differs by orders of magnitude more.
PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


@dataclass
class PoolStats:
    """Counters of a pool. ``restarts`` are replicas started again; ``rescored`` are batches that died with one."""

    ready: int = 0
    restarts: int = 0
    rescored: int = 0
    busy_seconds: float = 0.0
    label_bytes: int = 0
    last_error: str = ""


class TeacherPool:
    """Lives inside the stream's process, which therefore owns every label block.

    Args:
        blocks: parts that a batch's labels are returned in.
    """

    def __init__(self, spec: TeacherSpec, labels: LabelsSpec, model: TeacherModel, blocks: int) -> None:
        self._spec = spec
        self._replicas = [Replica(i, spec, labels, model, blocks) for i in range(spec.replicas)]
        self._idle: asyncio.Queue[Replica] = asyncio.Queue()
        self._reference: np.ndarray | None = None
        self._deaths = dict.fromkeys(range(spec.replicas), 0)
        self._starting: set[asyncio.Task[None]] = set()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.stats = PoolStats()

    @property
    def size(self) -> int:
        """Batches that can be scored at a time."""
        return len(self._replicas)

    @property
    def failed(self) -> bool:
        """True once no replica can be had any more."""
        return self._failed.done()

    def start(self) -> None:
        """Begin to start all replicas; batches are taken as soon as one is ready."""
        for replica in self._replicas:
            self._begin(self._start(replica))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    async def _start(self, replica: Replica) -> None:
        started = time.monotonic()
        try:
            probe = await replica.start()
        except Exception as error:
            if is_loss(error):
                await self._replace(replica, error)
                return
            # The model itself cannot be loaded or run: another try would end the same way.
            self._fail(f"teacher replica {replica.index} cannot start: {first_line(error)}")
            return
        if not self._proves_itself(replica, probe):
            return
        log.info("teacher replica %d ready after %.1f s", replica.index, time.monotonic() - started)
        self.stats.ready += 1
        self._idle.put_nowait(replica)

    def _proves_itself(self, replica: Replica, probe: np.ndarray) -> bool:
        """A replica must say what the first one said about the probe text before it serves."""
        if self._reference is None:
            self._reference = probe
        difference = float(np.abs(probe - self._reference).max())
        if difference <= PROBE_TOLERANCE[self._spec.dtype]:
            return True
        replica.stop()
        self._fail(f"teacher replica {replica.index} disagrees with the pool on the probe text by {difference:.3g}")
        return False

    def _fail(self, reason: str) -> None:
        self.stats.last_error = reason
        if not self._failed.done():
            self._failed.set_exception(RunError(reason))
            self._failed.exception()  # marks it as seen, for a pool may end before anyone waits

    async def _replace(self, replica: Replica, error: BaseException) -> None:
        """Start a dead replica again, a little later each time, until its restarts are used up."""
        replica.stop()
        self._deaths[replica.index] += 1
        self.stats.last_error = f"replica {replica.index}: {first_line(error)}"
        log.warning("teacher replica %d died: %s", replica.index, error)
        if self._deaths[replica.index] > self._spec.max_restarts:
            self._fail(
                f"teacher replica {replica.index} died {self._deaths[replica.index]} times, which is more than "
                f"teacher.max_restarts {self._spec.max_restarts}; the last time: {first_line(error)}. See to the "
                f"cluster, or raise teacher.max_restarts, and go on with --resume"
            )
            return
        self.stats.restarts += 1
        await asyncio.sleep(min(30.0, 0.5 * 2 ** self._deaths[replica.index]))
        self._begin(self._start(replica))

    async def _acquire(self) -> Replica:
        waiting = asyncio.ensure_future(self._idle.get())
        either: set[asyncio.Future[Any]] = {waiting, self._failed}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self._failed.done() and not waiting.done():
            waiting.cancel()
            await self._failed
        return await waiting

    async def _run(self, what: str, work: Callable[[Replica], Awaitable[T]]) -> T:
        """Do some work on whichever replica is idle; when that one dies, do it again on another."""
        while True:
            replica = await self._acquire()
            try:
                result = await work(replica)
            except Exception as error:
                if is_loss(error):
                    self.stats.ready -= 1
                    self.stats.rescored += 1
                    self._begin(self._replace(replica, error))
                    continue
                # The model itself fails on this input: another replica would too.
                reason = f"the teacher failed on {what}: {first_line(error)}"
                self._fail(reason)
                raise RunError(reason) from error
            self._idle.put_nowait(replica)
            return result

    async def _call(self, method: str, batch: Batch) -> list[ray.ObjectRef]:
        receipt, blocks = await self._run(f"batch {batch.number}", lambda replica: replica.call(method, batch))
        self.stats.busy_seconds += receipt.seconds
        self.stats.label_bytes += receipt.nbytes
        return blocks

    async def score(self, batch: Batch) -> list[ray.ObjectRef]:
        """Labels of a batch in the spec's kind, one reference per block.

        Raises:
            RunError: no replica can be had any more, or the teacher itself fails on this batch.
        """
        return await self._call("score", batch)

    async def hidden(self, batch: Batch) -> list[ray.ObjectRef]:
        """Last hidden states of a batch, one reference per block."""
        return await self._call("hidden", batch)

    async def head(self) -> np.ndarray:
        """The teacher's head weight, see :meth:`Shard.head`."""
        return await self._run("its head", lambda replica: replica.head())

    def stop(self) -> None:
        """End all replicas."""
        for task in self._starting:
            task.cancel()
        for replica in self._replicas:
            replica.stop()
