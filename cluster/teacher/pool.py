"""Interchangeable replicas: hands batches to whichever is idle, replaces those that die, and follows the students."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import ray

from cluster.capacity import Need, first_without_room, teacher_needs
from cluster.corpus.batches import Batch
from cluster.errors import RunError, first_line
from cluster.heads import OutputHead
from cluster.models import TeacherModel
from cluster.spec import LabelsSpec, TeacherSpec
from cluster.teacher.figures import PoolStats
from cluster.teacher.replica import Replica, is_loss, may_pass
from cluster.teacher.scaling import PACE, Demand, Look, Pace, Scaling

log = logging.getLogger(__name__)

T = TypeVar("T")

# Largest difference in probability between two replicas on the probe text. The same weights in bfloat16 on other
# hardware differ by rounding; a half-loaded teacher differs by orders of magnitude more.
PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}

LESS_MEMORY = "lower teacher.tokens_per_chunk, raise teacher.shards, or run fewer families on that node"
# A replica is started again after twice this, and each time after twice as long, in seconds.
AGAIN_S = 0.5


class TeacherPool:
    """Lives inside the stream's process, which therefore owns every label block.

    Args:
        blocks: parts that a batch's labels are returned in.
        demand: who waits for labels; without it, whoever has called and finds no replica idle.
        pace: how fast the pool follows, where ``teacher.replicas`` is a range.
    """

    def __init__(
        self,
        spec: TeacherSpec,
        labels: LabelsSpec,
        model: TeacherModel,
        blocks: int,
        demand: Demand | None = None,
        pace: Pace = PACE,
    ) -> None:
        self._spec, self._pace = spec, pace
        self._new = (Replica(index, spec, labels, model, blocks) for index in itertools.count())
        self._replicas = list(itertools.islice(self._new, spec.min_replicas))
        # Not one of the replicas before it has proved itself.
        self._candidate: Replica | None = None
        self._demand = demand or Demand(lambda: self.queued > 0, list, lambda: None)
        self._scaling = Scaling(spec.min_replicas, spec.max_replicas, pace, time.monotonic())
        # Whether a student needs the place of the next replica that has done its work.
        self._one_too_many = False
        self._all_busy_at = time.monotonic()
        self._slowest_start_s = 0.0
        self._idle: asyncio.Queue[Replica] = asyncio.Queue()
        self._reference: np.ndarray | None = None
        self._deaths: Counter[int] = Counter()
        self._starting: set[asyncio.Task[None]] = set()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.queued = 0
        self.stats = PoolStats(started=True, elastic=spec.max_replicas > spec.min_replicas)

    @property
    def size(self) -> int:
        """Batches that can be scored at a time. ``queued`` are those that wait for a replica."""
        return len(self._replicas)

    @property
    def failed(self) -> bool:
        """True once no replica can be had any more."""
        return self._failed.done()

    def start(self) -> None:
        """Begin to start all replicas; batches are taken as soon as one is ready."""
        for replica in self._replicas:
            self._begin(self._start(replica))
        if self.stats.elastic:
            self._begin(self._follow())

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    async def _start(self, replica: Replica) -> None:
        started = time.monotonic()
        try:
            probe = await replica.start()
        except Exception as error:
            if is_loss(error) or may_pass(error):
                await self._replace(replica, error)
                return
            # The model itself cannot be loaded or run: another try would end the same way.
            self._unfit(replica, f"teacher replica {replica.index} cannot start: {first_line(error, LESS_MEMORY)}")
            return
        try:
            self._proves_itself(replica, probe)
        except RunError as error:
            self._unfit(replica, str(error))
            return
        self._serve(replica, time.monotonic() - started)

    def _serve(self, replica: Replica, took_s: float) -> None:
        log.info("teacher replica %d ready after %.1f s", replica.index, took_s)
        self._slowest_start_s = max(self._slowest_start_s, took_s)
        self.stats.ready += 1
        self._idle.put_nowait(replica)

    def _proves_itself(self, replica: Replica, probe: np.ndarray) -> None:
        """A replica must say what the first one said about the probe text before it serves.

        Raises:
            RunError: it says something else.
        """
        if self._reference is None:
            self._reference = probe
        difference = float(np.abs(probe - self._reference).max())
        if difference > PROBE_TOLERANCE[self._spec.dtype]:
            raise RunError(
                f"teacher replica {replica.index} disagrees with the pool on the probe text by {difference:.3g}"
            )

    def _unfit(self, replica: Replica, reason: str) -> None:
        """A replica will not do, however often it is started: without it the pool is smaller, or at its end."""
        replica.stop()
        if not self._spared(replica, reason, self._spec.min_replicas):
            self._fail(reason)

    def _spared(self, replica: Replica, reason: str, least: int) -> bool:
        """Whether the pool can do without a replica that is lost; it is then smaller by that one.

        Args:
            least: replicas that must be left.
        """
        if self.size <= least:
            return False
        log.warning("continuing with %d teacher replicas: %s", self.size - 1, reason)
        self.stats.last_error = reason
        self.stats.lost += 1
        self._replicas.remove(replica)
        self._one_too_many = False
        self._scaling.failed(time.monotonic())
        self._demand.resized()
        return True

    def _fail(self, reason: str) -> None:
        self.stats.last_error = reason
        if not self._failed.done():
            self._failed.set_exception(RunError(reason))
            self._failed.exception()  # marks it as seen, for a pool may end before anyone waits

    async def _replace(self, replica: Replica, error: BaseException) -> None:
        """Start a replica again that died or did not start, later each time, until its restarts are used up."""
        replica.stop()
        what = "died" if is_loss(error) else "failed to start"
        log.warning("teacher replica %d %s: %s", replica.index, what, first_line(error, LESS_MEMORY))
        self.stats.last_error = f"replica {replica.index}: {first_line(error, LESS_MEMORY)}"
        if self._spared(replica, self.stats.last_error, self._spec.min_replicas):
            return
        self._deaths[replica.index] += 1
        if self._deaths[replica.index] > self._spec.max_restarts:
            reason = (
                f"teacher replica {replica.index} {what} {self._deaths[replica.index]} times, which is more than "
                f"teacher.max_restarts {self._spec.max_restarts}; the last time: {first_line(error, LESS_MEMORY)}"
            )
            # As long as another serves or may still do so, this one is no reason to end a night's work.
            if not self._spared(replica, reason, 1):
                self._fail(f"{reason}. Check the cluster or raise teacher.max_restarts, then resume with --resume")
            return
        self.stats.restarts += 1
        await asyncio.sleep(min(30.0, AGAIN_S * 2 ** self._deaths[replica.index]))
        self._begin(self._start(replica))

    # -- following the students ------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Look at the pool every now and then, and change it by one replica where that is due."""
        while not self.failed:
            await asyncio.sleep(self._pace.look_s)
            look = self._look(await self._is_crowded())
            change = self._scaling.decide(look)
            self._one_too_many = change < 0 and look.crowded
            if change > 0:
                await self._grow()
            elif change < 0 and not self._idle.empty():
                self._let_go(self._idle.get_nowait())

    def _look(self, crowded: bool) -> Look:
        all_busy = self._note_all_busy()
        contended, now = all_busy and self._demand.waits(), time.monotonic()
        return Look(now, self.size, self.stats.ready, contended, self._all_busy_at, self._slowest_start_s, crowded)

    async def _is_crowded(self) -> bool:
        """Whether the pool is in the place of a student and could be smaller."""
        if self.size <= self._spec.min_replicas:
            return False
        try:
            return not await self._fits(list(self._replicas))
        except Exception as error:
            # Whoever knows the nodes is away for a moment; the pool is followed on.
            log.warning("it is not known whether the students fit beside the teacher: %s", first_line(error))
            return False

    def _note_all_busy(self) -> bool:
        all_busy = self.stats.ready > 0 and self._idle.empty()
        if all_busy:
            self._all_busy_at = time.monotonic()
        return all_busy

    async def _grow(self) -> None:
        """Add a replica, if the cluster has room for one now. One that does not come up is no loss."""
        replica, started = next(self._new), time.monotonic()
        self._candidate = replica
        try:
            if not (
                self._may_grow()
                and await replica.reserve(self._pace.place_s)
                and await self._fits([*self._replicas, replica])
            ):
                self._scaling.no_room(time.monotonic())
                return
            self.stats.growing = True
            self._proves_itself(replica, await replica.load())
        except Exception as error:
            self.stats.last_error = f"a replica could not be added: {first_line(error, LESS_MEMORY)}"
            log.warning("teacher replica %d was not added: %s", replica.index, error)
            self._scaling.failed(time.monotonic())
            return
        else:
            self._candidate = None
            self._replicas.append(replica)
            self.stats.grown += 1
            self._serve(replica, time.monotonic() - started)
            self._scaling.resized(time.monotonic())
            self._demand.resized()
        finally:
            self.stats.growing = False
            self._dismiss_candidate()

    def _dismiss_candidate(self) -> None:
        if self._candidate is not None:
            self._candidate.stop()
            self._candidate = None

    def _may_grow(self) -> bool:
        """Whether the family may hold one more replica beside all its students."""
        shards = (self.size + 1) * self._spec.shards
        pool = replace(teacher_needs(self._spec), count=shards)
        return self._demand.most.allows([pool, *self._demand.students()])

    async def _fits(self, replicas: list[Replica]) -> bool:
        """Whether all students fit beside these replicas, so that one that is started again finds its place, and what
        other families need."""
        needs = [*self._demand.students(), *self._demand.others()]
        return await asyncio.to_thread(_fits_beside, needs, replicas)

    def _release(self, replica: Replica) -> None:
        """A replica has done its work: it waits for more, or makes room for a student."""
        if self._one_too_many and self.size > self._spec.min_replicas:
            self._let_go(replica)
            return
        self._note_all_busy()
        self._idle.put_nowait(replica)

    def _let_go(self, replica: Replica) -> None:
        """Stop a replica that does nothing now."""
        replica.stop()
        why = "makes room for a student" if self._one_too_many else "is not needed any more"
        log.info("teacher replica %d %s", replica.index, why)
        self._one_too_many = False
        self.stats.ready -= 1
        self.stats.shrunk += 1
        self._replicas.remove(replica)
        self._scaling.resized(time.monotonic())
        self._demand.resized()

    # -- calls -----------------------------------------------------------------------------------------------------

    async def _acquire(self) -> Replica:
        waiting = asyncio.ensure_future(self._idle.get())
        either: set[asyncio.Future[Any]] = {waiting, self._failed}
        self.queued += 1
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.queued -= 1
        if self._failed.done() and not waiting.done():
            waiting.cancel()
            await self._failed
        replica = await waiting
        self._note_all_busy()
        return replica

    async def _run(self, what: str, work: Callable[[Replica], Awaitable[T]]) -> T:
        """Do some work on whichever replica is idle; when that one dies, do it again on another."""
        deaths = 0
        while True:
            replica = await self._acquire()
            try:
                result = await work(replica)
            except Exception as error:
                if is_loss(error):
                    self.stats.ready -= 1
                    self.stats.rescored += 1
                    deaths += 1
                    self._begin(self._replace(replica, error))
                    # A range of replicas can be refilled for ever, and what kills each of them would go on to do so.
                    if deaths > self._spec.max_replicas * (1 + self._spec.max_restarts):
                        self._fail(
                            f"{deaths} teacher replicas died over {what}; the last: {first_line(error, LESS_MEMORY)}"
                        )
                    continue
                # The model itself fails on this input: another replica would too.
                reason = f"the teacher failed on {what}: {first_line(error, LESS_MEMORY)}"
                self._fail(reason)
                raise RunError(reason) from error
            self._release(replica)
            return result

    async def _call(self, method: str, batch: Batch) -> list[ray.ObjectRef]:
        receipt, blocks = await self._run(f"batch {batch.number}", lambda replica: replica.call(method, batch))
        self.stats.busy_seconds += receipt.seconds
        self.stats.label_bytes += receipt.nbytes
        self.stats.mfu = receipt.mfu
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

    async def head(self) -> OutputHead[np.ndarray]:
        """The teacher's head, see :meth:`Shard.head`."""
        return await self._run("its head", lambda replica: replica.head())

    def stop(self) -> None:
        """End all replicas."""
        for task in self._starting:
            task.cancel()
        for replica in self._replicas:
            replica.stop()
        self._dismiss_candidate()


def _fits_beside(needs: list[Need], replicas: list[Replica]) -> bool:
    """Whether all this fits on what the replicas leave of the nodes that are alive."""
    free = {node["NodeID"]: dict(node["Resources"]) for node in ray.nodes() if node["Alive"]}
    for replica in replicas:
        for node in replica.nodes():
            for name, amount in replica.bundle.items():
                if node in free:
                    free[node][name] = free[node].get(name, 0.0) - amount
    return first_without_room(needs, free.values()) is None
