"""The queue of a cluster as a Ray actor that everybody finds by its name, and that outlives whoever started it."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import ray
from ray.actor import ActorHandle

from cluster.limits import DRIVER, QUEUE_SHARE
from cluster.queue.held import held, holders, left
from cluster.queue.order import SETTLE_S, Entry, Order, Place
from cluster.session import alive_nodes, nodes_by_id

NAME, NAMESPACE = "queue", "stillhouse"


class FamilyQueue:
    """A Ray actor, see :class:`cluster.queue.order.Order`. Its death loses nothing: every driver comes back with what
    it was told last.

    Args:
        again: whoever starts it knows that there was one before.
    """

    def __init__(self, again: bool) -> None:
        again = again or ray.get_runtime_context().was_current_actor_reconstructed
        self._order = Order(time.monotonic() + SETTLE_S) if again else Order()

    def renew(self, entry: Entry) -> Place:
        """Enter, or say that the driver is still there; see :meth:`Order.renew`."""
        jobs = self._order.jobs | {entry.job}
        by_others = [each for each in held() if not each.is_of(jobs)]
        nodes = left(nodes_by_id(), by_others)
        place = self._order.renew(entry, time.monotonic(), time.time(), nodes)
        return replace(place, held=holders(by_others))

    def leave(self, key: str) -> None:
        """See :meth:`Order.leave`."""
        self._order.leave(key)


def queue_actor(again: bool) -> ActorHandle:
    """The cluster's queue; whoever comes first starts it.

    It lies on a node for drivers, where there are any. Ray of itself takes any node for what needs no CPU: one that is
    about to be taken away, or the head, with which the queue would die.
    """
    options: dict[str, Any] = {"name": NAME, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
    if any(DRIVER in resources for resources in alive_nodes()):
        options["resources"] = {DRIVER: QUEUE_SHARE}
    return ray.remote(FamilyQueue).options(num_cpus=0, max_restarts=-1, **options).remote(again)
