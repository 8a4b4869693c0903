"""Which family may start, and which waits: entries and nodes go in, decisions come out, no Ray.

The rule. A family is admitted when its needs fit on the nodes beside those of all that have been admitted, and it stays
so until its driver ends. Higher priority goes first; then whoever's user holds the smaller share of the cluster, where
the largest of the shares of CPUs, GPUs and memory counts (dominant resource fairness, Ghodsi et al., 2011); then who
came first.

While the first does not fit, others that do may go before it, but only ``MOST_PASSED`` times: then it goes before all
of its priority, and nobody behind it is admitted until it is. One that would not fit on the nodes even alone holds
nobody up. What others than families hold of a node, such as the arms of an endpoint, counts as
not there. An entry whose driver has not been heard of for ``SILENT_S`` is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from cluster.capacity import Need, first_without_room, most_of, totals

MOST_PASSED = 3
SILENT_S = 30.0
# Of a queue that was there before and has forgotten all: time for those who have a place to say so.
SETTLE_S = 10.0

Nodes = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Entry:
    """A family in the queue. Its driver keeps what it was told last, and with that brings back a queue that has died.

    Attributes:
        key: tells it from all others.
        stages: needs of what follows each other: the training, then the comparison of the endpoints.
        since: when it came, in seconds since 1970; 0 before it has been told.
        admitted: whether it has its place.
        passed: how often another went before it while it was the first.
        job: id of its driver's Ray job, as hex.
    """

    key: str
    user: str
    stages: tuple[tuple[Need, ...], ...]
    priority: int = 0
    since: float = 0.0
    admitted: bool = False
    passed: int = 0
    job: str = ""

    @cached_property
    def needs(self) -> list[Need]:
        """Places that are enough for each of its stages."""
        return most_of(self.stages)


@dataclass(frozen=True)
class Place:
    """What a driver is told.

    Attributes:
        entry: the family's, as the queue knows it now.
        number: its place among the ``waiting``, counted from 1; 0 once it is admitted.
        others: needs of the other families that have been admitted; ``running`` is their number.
        settled: false while families that had a place may still be coming back, and nobody is admitted.
        fits: whether it would fit on the nodes if no other family were there.
        held: what others than families hold of the nodes.
    """

    entry: Entry
    number: int
    waiting: int
    running: int
    others: list[Need]
    settled: bool
    fits: bool
    held: list[Need] = field(default_factory=list)


class Order:
    """Decides for one cluster. All times are in seconds, on a clock that only goes forward but for ``since``.

    Args:
        settled_at: before that nobody is admitted.
    """

    def __init__(self, settled_at: float = float("-inf")) -> None:
        self._settled_at = settled_at
        self._entries: dict[str, Entry] = {}
        self._heard: dict[str, float] = {}

    def renew(self, entry: Entry, now: float, at: float, nodes: Nodes) -> Place:
        """A driver enters its family, or says that it is still there.

        Args:
            entry: as the driver was told last. What the queue knows of it counts, if it knows it.
            at: seconds since 1970.
            nodes: resources of each node that is alive, as Ray names them, without what others than families hold.
        """
        known = self._entries.get(entry.key, entry)
        self._entries[entry.key] = known if known.since else replace(known, since=at)
        self._heard[entry.key] = now
        self._drop_silent(now)
        if now >= self._settled_at:
            while self._admit_one(nodes):
                pass
        return self._place(entry.key, now, nodes)

    def leave(self, key: str) -> None:
        """A family has ended, or does not want to wait any more. One that is not there is no mistake."""
        self._entries.pop(key, None)
        self._heard.pop(key, None)

    def waiting(self, nodes: Nodes) -> list[Entry]:
        """All that wait, in the order in which they would go if all of them found room."""
        left = [entry for entry in self._entries.values() if not entry.admitted]
        held: dict[str, list[Need]] = {}
        for entry in self.admitted():
            held.setdefault(entry.user, []).extend(entry.needs)
        there = [sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU", "memory")]

        def rank(entry: Entry) -> tuple[float | str, ...]:
            due = _is_due(entry)
            share = 0.0 if due else _share(held.get(entry.user, []), there)
            return -entry.priority, not due, share, entry.since, entry.key

        order = []
        while left:
            first = min(left, key=rank)
            left.remove(first)
            held.setdefault(first.user, []).extend(first.needs)
            order.append(first)
        return order

    @property
    def jobs(self) -> set[str]:
        """The jobs of all that are in the queue."""
        return {entry.job for entry in self._entries.values()}

    def admitted(self) -> list[Entry]:
        """All that have their place."""
        return [entry for entry in self._entries.values() if entry.admitted]

    def _drop_silent(self, now: float) -> None:
        for key in [key for key, heard in self._heard.items() if now - heard > SILENT_S]:
            self.leave(key)

    def _admit_one(self, nodes: Nodes) -> bool:
        """Admit the next one that may go and fits; false when there is none."""
        first: Entry | None = None
        for entry in self.waiting(nodes):
            if not _fits_alone(entry, nodes):
                continue
            if self._fits(entry, nodes):
                self._entries[entry.key] = replace(entry, admitted=True)
                if first is not None:
                    self._entries[first.key] = replace(first, passed=first.passed + 1)
                return True
            if _is_due(entry):
                return False
            first = first or entry
        return False

    def _fits(self, entry: Entry, nodes: Nodes) -> bool:
        """Whether one that fits alone fits beside all that are admitted."""
        others = [need for other in self.admitted() for need in other.needs]
        return not others or first_without_room([*others, *entry.needs], nodes) is None

    def _place(self, key: str, now: float, nodes: Nodes) -> Place:
        entry, waiting = self._entries[key], self.waiting(nodes)
        number = 0 if entry.admitted else 1 + [other.key for other in waiting].index(key)
        running = [other for other in self.admitted() if other.key != key]
        others = [need for other in running for need in other.needs]
        settled, fits = now >= self._settled_at, _fits_alone(entry, nodes)
        return Place(entry, number, len(waiting), len(running), others, settled, fits)


def _is_due(entry: Entry) -> bool:
    return entry.passed >= MOST_PASSED


def _fits_alone(entry: Entry, nodes: Nodes) -> bool:
    return all(first_without_room(stage, nodes) is None for stage in entry.stages)


def _share(needs: Iterable[Need], there: Sequence[float]) -> float:
    """The largest share of one kind of resource that somebody holds."""
    return max(held / total if total else 0.0 for held, total in zip(totals(needs), there, strict=True))
