"""Which batches the stream holds, which to fetch next and which to forget: numbers in, numbers out, no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import ray

# Batches that are read back ahead of a student that has fallen out of the window.
READ_AHEAD = 2


@dataclass
class Window:
    """Batches that students still need, and the ones on their way.

    Without a store the window begins at the slowest student, who thereby holds the others back. With one it begins at
    the fastest: a batch that is safe in the store may be forgotten and read again.

    Attributes:
        size: batches that may be ready ahead.
        total: batches of the pass.
        stored: whether there is a store.
        ready: label blocks by batch.
        in_flight: batches being fetched.
        safe: batches that are in the store.
    """

    size: int
    total: int
    stored: bool
    ready: dict[int, list[ray.ObjectRef]] = field(default_factory=dict)
    in_flight: set[int] = field(default_factory=set)
    safe: set[int] = field(default_factory=set)

    def _wanted(self, positions: Sequence[int]) -> list[int]:
        """Batches that should be ready, in rising order."""
        if not self.stored:
            ahead = set(range(min(positions), min(positions) + self.size))
        else:
            ahead = set(range(max(positions), max(positions) + self.size))
            ahead |= {position + step for position in positions for step in range(READ_AHEAD)}
        return sorted(number for number in ahead if number < self.total)

    @property
    def _unsafe(self) -> int:
        """Batches that only this process can give back."""
        return len(self.in_flight) + sum(number not in self.safe for number in self.ready)

    def next_to_fetch(self, positions: Sequence[int]) -> int | None:
        """The lowest batch that should be ready and is not on its way.

        While the store takes nothing, batches pile up until a window of them waits, and then everybody waits: only the
        slowest student is still given what it needs, so that the pass never stands still for good.

        Args:
            positions: per active student the first batch that it still needs.
        """
        for number in self._wanted(positions):
            if number in self.ready or number in self.in_flight:
                continue
            if self.stored and self._unsafe >= self.size and number != min(positions):
                return None
            return number
        return None

    def forget(self, positions: Sequence[int]) -> None:
        """Drop the batches that no student needs, or that can be read again; Ray then frees their blocks.

        The batch before a student's next one may still be read by some rank, so it stays.
        """
        if not positions:
            self.ready.clear()
            return
        keep = {*self._wanted(positions), *(position - 1 for position in positions)}
        for number in [n for n in self.ready if n not in keep]:
            if number < min(positions) or number in self.safe:
                del self.ready[number]
