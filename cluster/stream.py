"""The single pass: one ordered stream of scored batches, read by every student at its own pace within a window.

The stream calls the teacher pool, so it owns the labels; a dead teacher takes nothing with it. It keeps a batch
until the last student that needs it asks for a later one. Everything it holds can be built again: a batch that a
restarted student needs once more is scored once more.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray

from cluster.corpus.batches import Batch, Batches
from cluster.errors import RunError
from cluster.models import TeacherModel
from cluster.spec import FamilySpec
from cluster.teacher.pool import PoolStats, TeacherPool


@dataclass(frozen=True)
class Delivery:
    """What one rank gets of one batch.

    Attributes:
        batch: this rank's rows.
        labels: references to the label blocks of the same rows, in order.
        loss_tokens: positions that carry loss in the whole global batch.
    """

    batch: Batch
    labels: list[ray.ObjectRef]
    loss_tokens: int


@dataclass
class Consumer:
    """A student as the stream sees it.

    Attributes:
        next_of_rank: the batch that each rank asks for next. All before it were delivered once.
        lives: how often each rank has attached. A call from an earlier life must not move the present one.
        active: False once it has finished, failed or was taken out; then nobody waits for it.
        waited_s: seconds that its rank 0 waited for labels.
    """

    ranks: int
    next_of_rank: list[int] = field(init=False)
    lives: list[int] = field(init=False)
    active: bool = True
    waiting: bool = False
    waited_s: float = 0.0
    delivered: int = 0

    def __post_init__(self) -> None:
        self.next_of_rank, self.lives = [0] * self.ranks, [0] * self.ranks

    @property
    def attached(self) -> bool:
        """Whether every rank has said where it starts."""
        return all(self.lives)

    @property
    def position(self) -> int:
        """The first batch that some rank still needs."""
        return min(self.next_of_rank)


@dataclass(frozen=True)
class StreamStats:
    """A snapshot of the pass, for the progress display and for tests.

    Attributes:
        scored: how often the teacher scored each batch.
        delivered: batches that rank 0 of each student has been given.
        blocked_by: the slowest student, when the window is full because of it.
    """

    total: int
    scored: dict[int, int]
    delivered: dict[str, int]
    waiting: list[str]
    waited_s: dict[str, float]
    blocked_by: str | None
    window_used: int
    pool: PoolStats
    error: str | None


@dataclass
class _Window:
    """Scored batches that some student still needs, and the ones on their way."""

    ready: dict[int, list[ray.ObjectRef]] = field(default_factory=dict)
    in_flight: set[int] = field(default_factory=set)


class Stream:
    """A Ray actor with asynchronous methods; one per family.

    Args:
        corpus_dir: the packed corpus, readable on this actor's node.
    """

    def __init__(self, spec: FamilySpec, corpus_dir: str, teacher: TeacherModel) -> None:
        self._batches = Batches(Path(corpus_dir), spec.corpus, spec.evaluation.batches)
        self._spec = spec
        self._blocks = spec.blocks_per_batch
        self._teacher = teacher
        self._consumers = {name: Consumer(student.ranks) for name, student in spec.students.items()}
        self._window = _Window()
        self._scored: dict[int, int] = {}
        self._held_out: dict[int, asyncio.Task[list[ray.ObjectRef]]] = {}
        self._head: asyncio.Task[Any] | None = None
        self._changed = asyncio.Condition()
        self._error: str | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._pool: TeacherPool | None = None

    async def start(self) -> None:
        """Begin to start the teacher and to score."""
        self._pool = TeacherPool(self._spec.teacher, self._spec.labels, self._teacher, self._blocks)
        self._pool.start()
        self._spawn(self._dispatch())

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- scoring ---------------------------------------------------------------------------------------------------

    def _active(self) -> list[Consumer]:
        return [c for c in self._consumers.values() if c.active]

    def _next_to_score(self) -> int | None:
        """The lowest batch that an active student still needs, is inside the window, and is not there yet."""
        active = self._active()
        # Where a student starts is known when its ranks attach; to begin before that could score a batch twice.
        if not active or not all(c.attached for c in active):
            return None
        positions = [c.position for c in active]
        first = min(positions)
        for number in range(first, min(first + self._spec.stream.window, self._batches.count)):
            if number not in self._window.ready and number not in self._window.in_flight:
                return number
        return None

    async def _dispatch(self) -> None:
        """Keep as many batches in flight as there are replicas, never past the window."""
        assert self._pool is not None
        while self._error is None:
            async with self._changed:
                number = self._next_to_score()
                while number is None or len(self._window.in_flight) >= self._pool.size:
                    await self._changed.wait()
                    number = self._next_to_score()
                self._window.in_flight.add(number)
            self._spawn(self._score(number))

    async def _score(self, number: int) -> None:
        assert self._pool is not None
        try:
            blocks = await self._pool.score(self._batches.train(number))
        except RunError as error:
            await self._fail(str(error))
            return
        async with self._changed:
            self._window.in_flight.discard(number)
            self._window.ready[number] = blocks
            self._scored[number] = self._scored.get(number, 0) + 1
            self._changed.notify_all()

    async def _fail(self, reason: str) -> None:
        async with self._changed:
            self._error = reason
            self._changed.notify_all()

    # -- reading ---------------------------------------------------------------------------------------------------

    async def attach(self, student: str, rank: int, start: int) -> None:
        """A rank says which batch it will ask for first. A restarted rank may go back; the batches come again."""
        async with self._changed:
            consumer = self._consumers[student]
            consumer.next_of_rank[rank] = start
            consumer.lives[rank] += 1
            consumer.active = True
            self._changed.notify_all()

    async def next(self, student: str, rank: int, number: int) -> Delivery:
        """Batch ``number`` for one rank, waiting until it is scored. Asking for it says the one before is done.

        Raises:
            RunError: the batch is not the next one of this rank, or the teacher is lost for good.
        """
        consumer = self._consumers[student]
        if number != consumer.next_of_rank[rank]:
            raise RunError(f"{student} rank {rank} asked for batch {number}, its next is {consumer.next_of_rank[rank]}")
        started, life = time.monotonic(), consumer.lives[rank]
        async with self._changed:
            self._drop_consumed()
            self._changed.notify_all()
            while number not in self._window.ready:
                if self._error is not None:
                    raise RunError(self._error)
                consumer.waiting = True
                await self._changed.wait()
                if consumer.lives[rank] != life:
                    raise RunError(f"{student} rank {rank} has been started again; this call is from before")
            blocks = self._window.ready[number]
            consumer.waiting = False
            consumer.next_of_rank[rank] = number + 1
            if rank == 0:
                consumer.delivered += 1
                consumer.waited_s += time.monotonic() - started
        return self._deliver(self._batches.train(number), blocks, rank, consumer.ranks)

    def _drop_consumed(self) -> None:
        """Forget batches that every active student has asked past; Ray then frees their blocks.

        The batch before a rank's next one may still be read, so it is kept until the rank asks again.
        """
        first = min((c.position for c in self._active()), default=self._batches.count)
        for number in [n for n in self._window.ready if n < first]:
            del self._window.ready[number]

    def _deliver(self, batch: Batch, blocks: list[ray.ObjectRef], rank: int, ranks: int) -> Delivery:
        rows = len(batch.tokens_BS) // ranks
        share = self._blocks // ranks
        return Delivery(
            batch.rows(rank * rows, (rank + 1) * rows), blocks[rank * share : (rank + 1) * share], batch.loss_tokens
        )

    async def held_out(self, student: str, rank: int, number: int) -> Delivery:
        """Held-out batch ``number`` with the teacher's hidden states; scored once, kept for the whole run."""
        assert self._pool is not None
        batch = self._batches.held_out(number)
        if number not in self._held_out:
            self._held_out[number] = asyncio.ensure_future(self._pool.hidden(batch))
        blocks = await asyncio.shield(self._held_out[number])
        return self._deliver(batch, blocks, rank, self._consumers[student].ranks)

    async def teacher_head(self) -> np.ndarray:
        """The teacher's head weight [V, D], asked of the pool once."""
        assert self._pool is not None
        if self._head is None:
            self._head = asyncio.ensure_future(self._pool.head())
        return await asyncio.shield(self._head)

    async def detach(self, student: str) -> None:
        """A student has finished or failed: nobody waits for it any more."""
        async with self._changed:
            self._consumers[student].active = False
            self._consumers[student].waiting = False
            self._drop_consumed()
            self._changed.notify_all()

    # -- watching --------------------------------------------------------------------------------------------------

    async def stats(self) -> StreamStats:
        """A snapshot, see :class:`StreamStats`."""
        assert self._pool is not None
        active = {name: c for name, c in self._consumers.items() if c.active}
        slowest = min(active, key=lambda name: active[name].position, default=None)
        started = all(c.attached for c in active.values())
        full = bool(active) and started and self._next_to_score() is None and not self._window.in_flight
        left = slowest is not None and active[slowest].position + self._spec.stream.window < self._batches.count
        return StreamStats(
            total=self._batches.count,
            scored=dict(self._scored),
            delivered={name: c.delivered for name, c in self._consumers.items()},
            waiting=[name for name, c in active.items() if c.waiting],
            waited_s={name: c.waited_s for name, c in self._consumers.items()},
            blocked_by=slowest if full and left else None,
            window_used=len(self._window.ready),
            pool=self._pool.stats,
            error=self._error or (self._pool.stats.last_error or None if self._pool.failed else None),
        )

    async def stop(self) -> None:
        """End the teacher."""
        for task in self._tasks:
            task.cancel()
        if self._pool is not None:
            self._pool.stop()
