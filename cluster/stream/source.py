"""Where a batch's labels come from: the store if they are there, else the teacher, and then into the store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import ray
from ray.exceptions import ObjectLostError

from cluster import tracing
from cluster.audit import ScoringLog
from cluster.corpus.batches import Batch
from cluster.errors import StillhouseError
from cluster.heads import OutputHead
from cluster.labels.kinds import joined
from cluster.labels.store.leases import Lease
from cluster.labels.store.objects import labels_prefix
from cluster.labels.store.store import LabelStore
from cluster.labels.wire import Stamp, decode, encode
from cluster.models import TeacherModel
from cluster.spec import FamilySpec, HiddenLabels, LabelsSpec
from cluster.teacher.figures import PoolStats
from cluster.teacher.pool import TeacherPool
from cluster.teacher.scaling import PACE, Demand, Pace

log = logging.getLogger(__name__)

R = TypeVar("R")
Lost = Callable[[list[ray.ObjectRef]], None]

THREADS = 8
RENEW_S = 120.0
SAVE_AGAIN_S = 5.0
LAST_S = 10.0
HIDDEN = HiddenLabels(kind="hidden")


class LabelSource:
    """Gives labels of batches as references to blocks that this process owns. Lives in the stream's event loop.

    The teacher is started when something is missing from the store, and not before.

    Args:
        store: none where labels are not kept.
        log: what the teacher scored, also in earlier sessions of the run.
        holder: name under which what this run uses is protected from being cleaned up.
        demand: who waits for labels, for an elastic pool; ``pace`` is how fast it follows.
    """

    def __init__(
        self,
        spec: FamilySpec,
        teacher: TeacherModel,
        store: LabelStore | None,
        log: ScoringLog,
        holder: str,
        demand: Demand | None = None,
        pace: Pace = PACE,
    ) -> None:
        self._spec, self._teacher, self._store, self.log = spec, teacher, store, log
        self._blocks = spec.blocks_per_batch
        self._pool: TeacherPool | None = None
        # Apart, so that writes that a store in trouble does not take keep no reader waiting.
        self._readers = ThreadPoolExecutor(THREADS, thread_name_prefix="store-reads")
        self._writers = ThreadPoolExecutor(THREADS, thread_name_prefix="store-writes")
        self._lease: Lease | None = None
        self._holder = holder
        self._demand, self._pace = demand, pace
        self._saving: set[asyncio.Task[None]] = set()
        self._keeper: asyncio.Task[None] | None = None
        self.read: dict[int, int] = {}

    # -- the teacher -----------------------------------------------------------------------------------------------

    @property
    def stats(self) -> PoolStats:
        """The pool's counters; all zero while it was not needed."""
        return PoolStats() if self._pool is None else self._pool.stats

    @property
    def error(self) -> str | None:
        """Why no label can be had any more, if so."""
        return self.stats.last_error if self._pool is not None and self._pool.failed else None

    @property
    def replicas(self) -> int:
        """Batches that can be scored at a time: the pool's present size."""
        return self._spec.teacher.min_replicas if self._pool is None else self._pool.size

    @property
    def queued(self) -> int:
        """Batches that wait for a replica."""
        return 0 if self._pool is None else self._pool.queued

    def _started(self) -> TeacherPool:
        if self._pool is None:
            family = (self._spec.teacher, self._spec.labels, self._teacher, self._blocks)
            self._pool = TeacherPool(*family, self._demand, self._pace)
            self._pool.start()
        return self._pool

    async def open(self, train: Mapping[int, str], held_out: Sequence[str]) -> set[int]:
        """Look what is in the store and start the teacher if anything is not.

        Args:
            train: content addresses of the training batches that are still needed, by number.
            held_out: those of the held-out batches.

        Returns:
            Numbers of the training batches whose labels are there.

        Raises:
            UserError: the store cannot be used.
        """
        if self._store is None:
            self._started()
            return set()
        wanted = {number: self._stamp(self._spec.labels, address) for number, address in train.items()}
        exact = [self._stamp(HIDDEN, address) for address in held_out]
        prefixes = sorted({labels_prefix(stamp) for stamp in (*wanted.values(), *exact)})
        self._lease = await self._ask(self._store.lease, self._holder, *prefixes)
        self._keeper = asyncio.get_running_loop().create_task(self._renew(self._lease))
        await self._tried(self._store.name_teacher, self._teacher.fingerprint, self._spec.teacher.model)
        missing = await self._ask(self._store.missing, [*wanted.values(), *exact])
        if missing or await self._ask(self._store.get_head, self._teacher.fingerprint) is None:
            self._started()
        lost = {(stamp.labels, stamp.batch) for stamp in missing}
        return {number for number, stamp in wanted.items() if (stamp.labels, stamp.batch) not in lost}

    # -- labels ----------------------------------------------------------------------------------------------------

    def _stamp(self, spec: LabelsSpec, address: str) -> Stamp:
        return Stamp.of(self._teacher.fingerprint, self._teacher.tokenizer, spec, address)

    async def labels(self, batch: Batch, saved: Callable[[], None], lost: Lost) -> list[ray.ObjectRef]:
        """Labels of a training batch in the spec's kind, one reference per block.

        Args:
            saved: called once they are in the store, which may be later.
            lost: called instead with the references, when a node has died with them before the store had them.

        Raises:
            RunError: they are not in the store, and no replica can be had any more.
        """
        stamp = self._stamp(self._spec.labels, batch.address)
        if (blocks := await self._stored(stamp)) is not None:
            self.read[batch.number] = self.read.get(batch.number, 0) + 1
            saved()
            return blocks
        blocks = await self._started().score(batch)
        await asyncio.to_thread(self.log.add, batch.number, batch.address)
        self._save(stamp, blocks, saved, lost)
        return blocks

    async def hidden(self, batch: Batch, lost: Lost) -> list[ray.ObjectRef]:
        """Last hidden states of a held-out batch, one reference per block; ``lost`` as for :meth:`labels`."""
        stamp = self._stamp(HIDDEN, batch.address)
        if (blocks := await self._stored(stamp)) is not None:
            return blocks
        blocks = await self._started().hidden(batch)
        self._save(stamp, blocks, lambda: None, lost)
        return blocks

    async def head(self) -> OutputHead[np.ndarray]:
        """The teacher's head, cut to the vocabulary."""
        teacher = self._teacher.fingerprint
        if self._store is not None and (kept := await self._tried(self._store.get_head, teacher)) is not None:
            return kept
        head = await self._started().head()
        if self._store is not None:
            await self._tried(self._store.put_head, teacher, head)
        return head

    # -- the store -------------------------------------------------------------------------------------------------

    async def _ask(self, work: Callable[..., R], *args: Any) -> R:
        """Ask the store in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, lambda: work(*args))

    async def _tried(self, work: Callable[..., R], *args: Any) -> R | None:
        """The same, or None where the store cannot be reached or refuses us: it saves work, nothing depends on it."""
        try:
            return await self._ask(work, *args)
        except (StillhouseError, OSError) as error:
            log.warning("continuing without the label store: %s", error)
            return None

    async def _stored(self, stamp: Stamp) -> list[ray.ObjectRef] | None:
        if self._store is None:
            return None
        with tracing.span("store.get"):
            block = await self._tried(self._store.get, stamp)
        if block is None:
            return None
        return await asyncio.to_thread(_cut, block, self._blocks)

    def _save(self, stamp: Stamp, blocks: list[ray.ObjectRef], saved: Callable[[], None], lost: Lost) -> None:
        if self._store is None:
            return
        work = self._save_until_kept(self._store, stamp, blocks, saved, lost)
        task = asyncio.get_running_loop().create_task(work)
        self._saving.add(task)
        task.add_done_callback(self._saving.discard)

    async def _save_until_kept(
        self, store: LabelStore, stamp: Stamp, blocks: list[ray.ObjectRef], saved: Callable[[], None], lost: Lost
    ) -> None:
        """A store that is away, or lets us not write for now, delays what is kept; it loses nothing.

        What waits is held as references only, which Ray puts on the disk when its memory is full.
        """
        while True:
            try:
                with tracing.span("store.put"):
                    await asyncio.get_running_loop().run_in_executor(
                        self._writers, lambda: store.put(_whole(blocks), stamp)
                    )
                break
            except ObjectLostError as error:
                log.warning("a node died with the labels of batch %s before the store had them: %s", stamp.batch, error)
                lost(blocks)
                return
            except (StillhouseError, OSError) as error:
                log.warning("the label store does not take batch %s yet: %s", stamp.batch, error)
                await asyncio.sleep(SAVE_AGAIN_S)
        saved()

    @property
    def unsaved(self) -> int:
        """Batches that the store has not taken yet."""
        return len(self._saving)

    async def _renew(self, lease: Lease) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            await self._tried(lease.renew)

    async def publish(self, addresses: Sequence[str], wait_s: float) -> None:
        """Say in the store that the labels of a whole pass are there, once they are.

        Args:
            addresses: content addresses of its batches, in order.
            wait_s: seconds that the store may take for what it has not taken yet.
        """
        if self._store is None:
            return
        if self._saving:
            await asyncio.wait(set(self._saving), timeout=wait_s)
        stamps = [self._stamp(self._spec.labels, address) for address in addresses]
        facts = {"teacher": self._spec.teacher.model, "labels": self._spec.labels.model_dump(), "run": self._holder}
        await self._tried(self._store.publish, self._spec.name, stamps, facts)

    async def close(self) -> None:
        """End the teacher and let go of the store; what it does not take in a moment is scored again one day."""
        if self._saving:
            await asyncio.wait(set(self._saving), timeout=LAST_S)
        for task in (*self._saving, *([self._keeper] if self._keeper else [])):
            task.cancel()
        if self._lease is not None:
            await self._tried(self._lease.release)
        if self._pool is not None:
            self._pool.stop()


def _cut(block: np.ndarray, blocks: int) -> list[ray.ObjectRef]:
    """A whole batch's block as references to its parts, owned by this process."""
    if blocks == 1:
        return [ray.put(block)]
    labels, stamp = decode(block)
    size = labels.sequences // blocks
    return [ray.put(encode(labels.rows(i * size, (i + 1) * size), stamp)) for i in range(blocks)]


def _whole(blocks: list[ray.ObjectRef]) -> np.ndarray:
    """Undo :func:`_cut`."""
    parts = ray.get(blocks)
    if len(parts) == 1:
        return parts[0]
    read = [decode(part) for part in parts]
    return encode(joined([labels for labels, _ in read]), read[0][1])
