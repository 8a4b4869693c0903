"""The single pass: one ordered stream of labelled batches, read by every student at its own pace.

The stream fetches labels, from the store or the teacher, so it owns them; a dead teacher takes nothing with it. All
that it holds can be built again from what its readers ask for and from the store, so it may be restarted itself.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray

from cluster import tracing
from cluster.audit import ScoringLog
from cluster.capacity import Need, student_needs
from cluster.corpus.batches import CORPUS_FOLDER, Batches
from cluster.errors import RunError, StillhouseError, first_line
from cluster.heads import OutputHead
from cluster.labels.store.store import LabelStore
from cluster.limits import NO_LIMIT, Most
from cluster.models import TeacherModel
from cluster.spec import FamilySpec
from cluster.stream.consumer import Consumer
from cluster.stream.figures import Delivery, HeldError, StreamStats
from cluster.stream.source import LabelSource
from cluster.stream.window import Window
from cluster.teacher.scaling import PACE, Demand, Pace

T = TypeVar("T")

# Batches that may be on their way from the store beside those that the teacher scores.
READS = 4
# How long the end of a pass waits for a store that is away.
CLOSE_S = 300.0


class Stream:
    """A Ray actor with asynchronous methods; one per family.

    Args:
        folder: the run's, on this actor's node; the packed corpus lies in it.
        store: where labels are kept, see :func:`cluster.labels.store.uri.open_bucket`; none keeps none.
        pace: how fast an elastic pool follows the students; ``most`` is what it may hold together with them.
    """

    def __init__(
        self,
        spec: FamilySpec,
        folder: str,
        teacher: TeacherModel,
        store: str | None,
        pace: Pace = PACE,
        most: Most = NO_LIMIT,
    ) -> None:
        # Ray warns of any ``ray.get`` in such an actor. The source's runs in a thread, where it blocks no event loop.
        os.environ["RAY_WARN_BLOCKING_GET_INSIDE_ASYNC"] = "0"
        self._folder = Path(folder)
        self._batches = Batches(self._folder / CORPUS_FOLDER, spec.corpus, spec.evaluation.batches)
        self._spec, self._teacher = spec, teacher
        self._store_uri, self._pace, self._most = store, pace, most
        self._others: list[Need] = []
        # After a restart it is unknown which students have finished; those that have not attach again.
        self._again = ray.get_runtime_context().was_current_actor_reconstructed
        count = self._batches.count
        self._consumers = {name: Consumer(each.ranks, count, self._again) for name, each in spec.students.items()}
        self._window = Window(spec.stream.window, self._batches.count, store is not None)
        self._traces: dict[int, str] = {}
        self._held_out: dict[int, asyncio.Task[list[ray.ObjectRef]]] = {}
        self._head: asyncio.Task[Any] | None = None
        self._changed = asyncio.Condition()
        self._error: str | None = None
        self._held = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._source: LabelSource | None = None
        self._starting: asyncio.Task[None] | None = None

    # -- starting --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Look into the store, begin to start the teacher where it is needed, and to fetch. May be called again."""
        if self._starting is None:
            self._starting = asyncio.get_running_loop().create_task(self._start())
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        try:
            # In a thread, for a full disk is waited for.
            log = await asyncio.to_thread(ScoringLog, self._folder, self._spec.patience_s)
            store = None if self._store_uri is None else await asyncio.to_thread(LabelStore.open, self._store_uri)
            wanted = ({}, []) if store is None else await asyncio.to_thread(self._addresses)
            holder = self._folder.name
            self._source = LabelSource(self._spec, self._teacher, store, log, holder, self._demand(), self._pace)
            self._window.safe = await self._source.open(*wanted)
        except (StillhouseError, OSError) as error:
            await self._fail(str(error))
            return
        except Exception as error:
            # Otherwise the next student that asks would fail with this error as its own.
            await self._fail(f"the pass cannot begin: {first_line(error)}")
            return
        self._spawn(self._dispatch())

    def _addresses(self) -> tuple[dict[int, str], list[str]]:
        train = {number: self._batches.train(number).address for number in range(self._batches.count)}
        return train, [self._batches.held_out(number).address for number in range(self._batches.held_out_count)]

    async def _labels_from(self) -> LabelSource:
        await self.start()
        if self._error is not None:
            raise HeldError(self._error)
        assert self._source is not None
        return self._source

    async def _or_held(self, fetched: asyncio.Task[T]) -> T:
        """What is fetched for everybody who asks; when it cannot be had, the pass is held.

        Raises:
            HeldError: it cannot be had.
        """
        try:
            return await asyncio.shield(fetched)
        except RunError as error:
            await self._fail(str(error))
            raise HeldError(str(error)) from error

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- fetching --------------------------------------------------------------------------------------------------

    def _active(self) -> list[Consumer]:
        return [c for c in self._consumers.values() if c.active and (c.seen or not self._again)]

    def _positions(self) -> list[int] | None:
        """The first batch that each active student needs; none before they have said where they start.

        To begin before that could score a batch twice. After a restart nobody is waited for: a rank that has what it
        needs asks again only when it has learnt it, which it may do together with one that waits for us.
        """
        active = self._active()
        if not active or not (self._again or all(c.attached for c in active)):
            return None
        return [c.position for c in active]

    def _next_to_fetch(self) -> int | None:
        positions = self._positions()
        return None if positions is None else self._window.next_to_fetch(positions)

    async def _dispatch(self) -> None:
        """Keep as many batches on their way as there are replicas, and some for the store, never past the window."""
        source = self._source
        assert source is not None
        reads = READS if self._window.stored else 0
        while self._error is None:
            async with self._changed:
                number = self._next_to_fetch()
                while number is None or len(self._window.in_flight) >= source.replicas + reads:
                    await self._changed.wait()
                    number = self._next_to_fetch()
                self._window.in_flight.add(number)
            self._spawn(self._fetch(number))

    def _starved(self) -> bool:
        """Whether a student waits for labels, and one more replica would have a batch to score for it.

        Of the students the fastest counts: the others read what was scored for it, or get what it is given.
        """
        assert self._source is not None
        active = self._active()
        first = max((c.position for c in active), default=0)
        waits = any(c.waiting for c in active if c.position == first)
        measured = any(not task.done() for task in self._held_out.values())
        return (waits or measured) and (self._source.queued > 0 or self._next_to_fetch() is not None)

    def _demand(self) -> Demand:
        def resized() -> None:
            self._spawn(self._notify())

        return Demand(self._starved, self._student_needs, resized, lambda: self._others, self._most)

    def _student_needs(self) -> list[Need]:
        """What the students take from the cluster that are not done; after a restart all, until it is said again."""
        students = self._spec.students.items()
        return [student_needs(name, student) for name, student in students if not self._consumers[name].done]

    async def _fetch(self, number: int) -> None:
        run = self._folder.name
        with tracing.trace("fetch", of=f"{run} {number}", run=run, batch=number):
            trace, blocks = tracing.carried(), await self._labelled(number)
        if blocks is None:
            return
        async with self._changed:
            self._window.in_flight.discard(number)
            self._window.ready[number] = blocks
            self._traces = {n: t for n, t in (*self._traces.items(), (number, trace)) if t and n in self._window.ready}
            self._changed.notify_all()

    async def _labelled(self, number: int) -> list[ray.ObjectRef] | None:
        """The labels of a batch; none where they cannot be had, which is the end of the pass."""
        assert self._source is not None
        try:
            return await self._source.labels(
                self._batches.train(number),
                lambda: self._saved(number),
                lambda lost: self._spawn(self.lost(number, lost)),
            )
        except RunError as error:
            await self._fail(str(error))
        except Exception as error:
            # Left alone, it would be on its way for ever, and everybody would wait for it.
            await self._fail(f"the labels of batch {number} cannot be had: {first_line(error)}")
        return None

    def _saved(self, number: int) -> None:
        """A batch is in the store; whoever waits because the store took nothing may go on."""
        self._window.safe.add(number)
        self._spawn(self._notify())

    async def _notify(self) -> None:
        async with self._changed:
            self._forget()
            self._changed.notify_all()

    def _forget(self) -> None:
        self._window.forget([c.position for c in self._active()])

    async def _fail(self, reason: str) -> None:
        """No further label can be had: the pass is held, so that the students commit what they have learnt."""
        async with self._changed:
            self._error = self._error or reason
            self._hold()

    # -- reading ---------------------------------------------------------------------------------------------------

    async def attach(self, student: str, rank: int, start: int, again: bool = False) -> None:
        """A rank reports which batch it will ask for first. A restarted rank may go back; the batches come again.

        Args:
            again: whether the rank has attached before in its life, to this stream or to one that died.
        """
        await self.start()
        async with self._changed:
            consumer = self._consumers[student]
            consumer.attach(rank, start, again, self._held)
            self._changed.notify_all()

    async def hold(self) -> None:
        """Give each student only what one of its ranks has already, so that all of them stop at the same batch."""
        async with self._changed:
            self._hold()

    def _hold(self) -> None:
        if not self._held:
            self._held = True
            for consumer in self._consumers.values():
                consumer.until = consumer.furthest
        self._changed.notify_all()

    async def lost(self, number: int, labels: list[ray.ObjectRef], held_out: bool = False) -> None:
        """Blocks of a batch cannot be had any more, because a node died with them: have them fetched again.

        Args:
            labels: those that were tried. Where others are held by now, somebody else has said so before.
        """
        async with self._changed:
            if held_out:
                known = self._held_out.get(number)
                if known is not None and known.done() and set(labels) & set(known.result()):
                    del self._held_out[number]
            elif set(labels) & set(self._window.ready.get(number, [])):
                del self._window.ready[number]
            self._changed.notify_all()

    async def waits(self, student: str, rank: int, number: int) -> None:
        """A rank has learnt what it had and needs batch ``number``, which it has asked for ahead."""
        consumer = self._consumers[student]
        if rank == 0 and number == consumer.next_of_rank[0] and consumer.waits_since is None:
            consumer.waits_since = time.monotonic()

    async def next(self, student: str, rank: int, number: int, ahead: bool = False) -> Delivery:
        """Batch ``number`` for one rank, waiting until it is there. Asking for it says that it has the one before.

        Args:
            ahead: the rank still learns the one before; it does not wait until it says so, see :meth:`waits`.

        Raises:
            RunError: the batch is not the next one of this rank, or the teacher is lost for good.
            HeldError: the pass is held before this batch.
        """
        consumer = self._consumers[student]
        if not consumer.lives[rank]:
            # This stream was started again while the rank was learning.
            await self.attach(student, rank, number, again=True)
        consumer.here.add(rank)
        if number != consumer.next_of_rank[rank]:
            raise RunError(f"{student} rank {rank} asked for batch {number}, its next is {consumer.next_of_rank[rank]}")
        life, asked_ns = consumer.lives[rank], time.time_ns()
        if not ahead:
            await self.waits(student, rank, number)
        async with self._changed:
            self._forget()
            self._changed.notify_all()
            while number not in self._window.ready or consumer.holds(number):
                if consumer.holds(number):
                    # A peer that is not known yet may be learning this batch, and waits there for this rank.
                    if consumer.all_known:
                        raise HeldError(f"the pass is held before batch {number}")
                elif self._error is not None:
                    raise RunError(self._error)
                await self._changed.wait()
                if consumer.lives[rank] != life:
                    raise RunError(f"{student} rank {rank} has been started again; this call is from before")
            blocks = self._window.ready[number]
            consumer.given(rank, number)
            trace = self._traces.get(number, "")
        tracing.record("deliver", trace, asked_ns, student=student, rank=rank)
        return Delivery.of(self._batches.train(number), blocks, rank, consumer.ranks, trace)

    async def held_out(self, student: str, rank: int, number: int) -> Delivery:
        """Held-out batch ``number`` with the teacher's hidden states; fetched once, kept for the whole run.

        Raises:
            HeldError: they cannot be had any more.
        """
        batch = self._batches.held_out(number)
        if number not in self._held_out:
            source = await self._labels_from()
        if number not in self._held_out:
            self._held_out[number] = asyncio.ensure_future(
                source.hidden(batch, lambda lost: self._spawn(self.lost(number, lost, held_out=True)))
            )
        blocks = await self._or_held(self._held_out[number])
        return Delivery.of(batch, blocks, rank, self._consumers[student].ranks)

    async def teacher_head(self) -> OutputHead[np.ndarray]:
        """The teacher's head, fetched once.

        Raises:
            HeldError: it cannot be had any more.
        """
        if self._head is None:
            source = await self._labels_from()
        if self._head is None:
            self._head = asyncio.ensure_future(source.head())
        return await self._or_held(self._head)

    async def detach(self, student: str) -> None:
        """A student needs no further batch: nobody waits for it any more."""
        async with self._changed:
            self._consumers[student].active = False
            self._consumers[student].waits_since = None
            self._forget()
            self._changed.notify_all()

    async def done(self, students: list[str]) -> None:
        """The tasks of these students have ended. To be said again now and then, for a restart forgets it."""
        for student in students:
            if not self._consumers[student].done:
                self._consumers[student].done = True
                await self.detach(student)

    async def beside(self, others: list[Need]) -> None:
        """What other families on the cluster need. To be said again and again, for a restart forgets it."""
        self._others = others

    # -- watching --------------------------------------------------------------------------------------------------

    async def stats(self) -> StreamStats:
        """A snapshot, see :class:`StreamStats`."""
        await self.start()
        source = self._source
        if source is None:
            return StreamStats.unstarted(self._batches.count, self._error)
        idle = self._positions() is not None and self._next_to_fetch() is None and not self._window.in_flight
        # Once somebody learns, the loss of the pool counts when a label is missing, for there may be enough.
        error = self._error or (None if any(c.seen for c in self._consumers.values()) else source.error)
        return StreamStats.of(self._consumers, self._window, source, idle, error)

    async def finish(self) -> None:
        """The pass is complete: wait until the store has all of it and say so there."""
        await self.start()
        if self._source is not None and self._window.stored and self._error is None:
            train, _ = await asyncio.to_thread(self._addresses)
            await self._source.publish(list(train.values()), CLOSE_S)

    async def stop(self) -> None:
        """End the teacher."""
        for task in self._tasks:
            task.cancel()
        if self._source is not None:
            await self._source.close()
        await asyncio.to_thread(tracing.flush)
