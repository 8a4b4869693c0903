"""A whole teacher: its shards in one placement group, started, called and ended together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster import tracing
from cluster.capacity import teacher_needs
from cluster.errors import LabelError, UserError, first_line
from cluster.heads import OutputHead
from cluster.models import TeacherModel
from cluster.spec import LabelsSpec, TeacherSpec
from cluster.teacher.shard import Receipt, Shard

# Seconds that the other shards get to show whether a failed call was really the death of one of them.
DEATH_GRACE_S = 5.0


class ReplicaLostError(Exception):
    """Some shards do not answer any more: their node is gone, or they wait for ever for one that has failed."""


def is_loss(error: BaseException) -> bool:
    """Whether a call failed because the replica is gone, with a process, a node or its place on the cluster.

    What the model itself raises comes as a ``RayTaskError``; every other error of Ray's says that something died.
    """
    if isinstance(error, (ReplicaLostError, TimeoutError)):
        return True
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)


# What Python and the libraries raise about the model itself, or about our own code: the next try meets the same model.
PERSISTENT = (UserError, LabelError, ValueError, TypeError, LookupError, AttributeError, ImportError, AssertionError)


def may_pass(error: BaseException) -> bool:
    """Whether a replica that failed to start may start later: a file or a mount that is slow to appear, a port that is
    taken, a device that another process has not left yet. Whatever is not known to be the model's fault may pass."""
    return not isinstance(getattr(error, "cause", None) or error, PERSISTENT)


class Replica:
    """One replica. It holds no state worth saving: when any shard dies, the whole replica is stopped and replaced."""

    def __init__(self, index: int, spec: TeacherSpec, labels: LabelsSpec, model: TeacherModel, blocks: int) -> None:
        self.index = index
        self._spec, self._blocks = spec, blocks
        self._arguments = (spec, labels, model, blocks)
        self._group: PlacementGroup | None = None
        self._shards: list[ActorHandle] = []

    async def start(self) -> np.ndarray:
        """Place the shards, load the weights, and return the probe's answer.

        Raises:
            ReplicaLostError: not placed and loaded within ``teacher.start_timeout_s``.
            ray.exceptions.RayError: a shard or its node died on the way; see :func:`is_loss`.
        """
        async with self._in_time():
            await self._reserve().ready()
            return await self._load()

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        limit = self._spec.start_timeout_s
        try:
            async with asyncio.timeout(limit):
                yield
        except TimeoutError as error:
            within = f"within teacher.start_timeout_s {limit:g} s"
            if self._shards:
                raise ReplicaLostError(f"it was placed, and not loaded {within}") from error
            need = replace(teacher_needs(self._spec), count=self._spec.shards)
            raise ReplicaLostError(
                f"it found no place {within}: {need}, and no node has that free; end what else runs there, such as an "
                f"endpoint, or add nodes"
            ) from error

    def _reserve(self) -> PlacementGroup:
        # PACK: the shards talk at every layer, so they belong on one node where one has room.
        self._group = placement_group([self.bundle] * self._spec.shards, strategy="PACK")
        return self._group

    async def _load(self) -> np.ndarray:
        self._shards = [self._place(rank) for rank in range(self._spec.shards)]
        host, port = await self._shards[0].free_address.remote()
        await _all_or_death([shard.join.remote(host, port) for shard in self._shards])
        return (await _all_or_death([shard.probe.remote() for shard in self._shards]))[0]

    @property
    def bundle(self) -> dict[str, float]:
        """Resources of one shard, as Ray names them."""
        each = {"CPU": self._spec.cpus_per_shard, "GPU": self._spec.gpus_per_shard}
        each["memory"] = self._spec.memory_per_shard or 0
        return {name: amount for name, amount in each.items() if amount}

    async def reserve(self, within_s: float) -> bool:
        """Take the resources where the cluster has them free; without them there is nothing to stop afterwards."""
        free = await asyncio.to_thread(ray.available_resources)
        # A little slack, for tenths do not add up exactly in binary.
        if any(free.get(name, 0.0) < self._spec.shards * amount - 1e-6 for name, amount in self.bundle.items()):
            return False
        if await asyncio.to_thread(self._reserve().wait, within_s):
            return True
        self.stop()
        return False

    async def load(self) -> np.ndarray:
        """The rest of :meth:`start` after :meth:`reserve`. Raises as it does."""
        async with self._in_time():
            return await self._load()

    def nodes(self) -> list[str]:
        """The node of each shard, as an id; blocks for as long as it takes to ask."""
        group = self._group  # it may be given back meanwhile
        return [] if group is None else list(placement_group_table(group).get("bundles_to_node_id", {}).values())

    def _place(self, rank: int) -> ActorHandle:
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)
        options = {
            "num_cpus": self._spec.cpus_per_shard,
            "num_gpus": self._spec.gpus_per_shard,
            "memory": self._spec.memory_per_shard,
            "scheduling_strategy": strategy,
        }
        return ray.remote(Shard).options(**options).remote(*self._arguments, rank)

    async def call(self, method: str, batch: Any) -> tuple[Receipt, list[ray.ObjectRef]]:
        """Run ``score`` or ``hidden`` on all shards.

        The blocks are return values of the call, so the caller's process owns them and they outlive the replica.
        Only the small receipts are fetched here.
        """
        trace = tracing.carried()
        first = getattr(self._shards[0], method).options(num_returns=self._blocks + 1).remote(batch, trace)
        others = [getattr(shard, method).remote(batch, trace) for shard in self._shards[1:]]
        try:
            receipt, *_ = await _all_or_death([first[0], *others])
        except Exception:
            _look_away(first[1:])
            raise
        return receipt, first[1:]

    async def head(self) -> OutputHead[np.ndarray]:
        """The teacher's head, see :meth:`Shard.head`."""
        return (await _all_or_death([shard.head.remote() for shard in self._shards]))[0]

    def stop(self) -> None:
        """End the shards and give the resources back. Does nothing the second time."""
        for shard in self._shards:
            ray.kill(shard, no_restart=True)
        self._shards = []
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None


async def _all_or_death(refs: list[ray.ObjectRef]) -> list[Any]:
    """Results of one call on all shards.

    When a shard dies, its peers fail too, with an error of their collective that may arrive first. The death is the
    cause, so it is waited for a moment and raised before any other. A shard on a node that was cut off says nothing
    for a long time; that it does not answer while another has failed is enough.

    Raises:
        ReplicaLostError: one failed, and others do not answer.
    """
    tasks = [asyncio.ensure_future(_value(ref)) for ref in refs]
    for task in tasks:
        # One that fails when nobody waits any more is no news.
        task.add_done_callback(lambda t: t.cancelled() or t.exception())
    await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    if any(t.done() and t.exception() for t in tasks):
        await asyncio.wait(tasks, timeout=DEATH_GRACE_S)
    errors = [error for t in tasks if t.done() and (error := t.exception())]
    silent = sum(not t.done() for t in tasks)
    for error in sorted(errors, key=lambda e: not is_loss(e)):
        if silent and not is_loss(error):
            raise ReplicaLostError(f"{silent} of its shards do not answer; another says {first_line(error)}") from error
        raise error
    return [t.result() for t in tasks]


async def _value(ref: ray.ObjectRef) -> Any:
    return await ref


def _look_away(refs: list[ray.ObjectRef]) -> None:
    """Drop results of a call that has failed: Ray reports an error that nobody has looked at, at any later moment."""
    for ref in refs:
        ref.future().add_done_callback(lambda done: done.exception())
