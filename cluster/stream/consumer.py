"""A student as the stream sees it: what each of its ranks needs next, and whether it waits. No Ray."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Consumer:
    """A student as the stream sees it.

    Attributes:
        batches: of the pass. ``restarted`` is whether the stream was: some ranks may have read more from the old one.
        next_of_rank: the batch that each rank asks for next. All before it were delivered once.
        lives: how often each rank has attached. A call from an earlier life must not move the present one.
        here: ranks of the student's present life that have attached or asked; of the others ``next_of_rank`` is stale.
        active: False once it has read its last batch or failed; then nobody waits for it.
        done: whether its task has ended, well or not; before that it may need to be started again, also to measure.
        until: the first batch that it is not given any more, where the pass is held.
        waits_since: when its rank 0 began to wait for labels, if it does; ``waited_s`` are the seconds that it did.
    """

    ranks: int
    batches: int
    restarted: bool
    next_of_rank: list[int] = field(init=False)
    lives: list[int] = field(init=False)
    here: set[int] = field(default_factory=set)
    active: bool = True
    done: bool = False
    until: int | None = None
    waits_since: float | None = None
    waited_s: float = 0.0
    delivered: int = 0

    def __post_init__(self) -> None:
        self.next_of_rank, self.lives = [0] * self.ranks, [0] * self.ranks

    @property
    def attached(self) -> bool:
        """Whether every rank has said where it starts."""
        return all(self.lives)

    @property
    def seen(self) -> bool:
        """Whether any rank has said what it needs."""
        return any(self.lives)

    @property
    def waiting(self) -> bool:
        """Whether it has nothing to learn from at the moment."""
        return self.waits_since is not None

    @property
    def furthest(self) -> int:
        """The first batch that no rank of the present life has been given."""
        return max((self.next_of_rank[rank] for rank in self.here), default=0)

    @property
    def all_known(self) -> bool:
        """Whether no rank can have more batches than is known of the student."""
        return not self.restarted or len(self.here) == self.ranks

    def attach(self, rank: int, start: int, again: bool, held: bool) -> None:
        """Note which batch a rank asks for first.

        Args:
            again: whether the rank continues its life. Otherwise a rank that is here already begins a new one.
        """
        if not again and rank in self.here:
            self.here.clear()
        self.here.add(rank)
        self.next_of_rank[rank] = start
        self.lives[rank] += 1
        # All ranks of a life start at the same batch, but a peer may have been given it before the hold.
        self.until = max((self.until or 0) if again else 0, self.furthest) if held else None
        self.active, self.waits_since = True, None

    def holds(self, number: int) -> bool:
        """Whether it is not to be given this batch."""
        if self.until is None or number < self.until:
            return False
        # A peer that has the last batch never asks again, so it does not become known; one that lacks it gets it too.
        return self.all_known or number + 1 < self.batches

    def given(self, rank: int, number: int) -> None:
        """Note that a rank has got a batch; rank 0 counts for the student."""
        self.next_of_rank[rank] = number + 1
        if self.until is not None:
            self.until = max(self.until, number + 1)
        if rank:
            return
        self.delivered += 1
        if self.waits_since is not None:
            self.waited_s += time.monotonic() - self.waits_since
            self.waits_since = None

    @property
    def position(self) -> int:
        """The first batch that some rank still needs, of those that have said so."""
        said = zip(self.next_of_rank, self.lives, strict=True)
        return min((number for number, lives in said if lives), default=0)
