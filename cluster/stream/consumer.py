"""A student as the stream sees it: what each of its ranks needs next, and whether it waits. No Ray."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Consumer:
    """A student as the stream sees it.

    Attributes:
        next_of_rank: the batch that each rank asks for next. All before it were delivered once.
        lives: how often each rank has attached. A call from an earlier life must not move the present one.
        here: ranks of the student's present life that have attached or asked; of the others ``next_of_rank`` is stale.
        active: False once it has read its last batch or failed; then nobody waits for it.
        done: whether its task has ended, well or not; before that it may need to be started again, also to measure.
        until: the first batch that it is not given any more, where the pass is held.
        waits_since: when its rank 0 began to wait for labels, if it does; ``waited_s`` are the seconds that it did.
    """

    ranks: int
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

    def attach(self, rank: int, start: int, again: bool) -> None:
        """Note which batch a rank asks for first.

        Args:
            again: whether the rank goes on in its life. Otherwise a rank that is here already begins a new one.
        """
        if not again and rank in self.here:
            self.here.clear()
        self.here.add(rank)
        self.next_of_rank[rank] = start
        self.lives[rank] += 1
        self.active, self.waits_since = True, None

    def holds(self, number: int) -> bool:
        """Whether it is not to be given this batch."""
        return self.until is not None and number >= self.until

    def given(self) -> None:
        """Count that its rank 0 has got a batch."""
        self.delivered += 1
        if self.waits_since is not None:
            self.waited_s += time.monotonic() - self.waits_since
            self.waits_since = None

    @property
    def position(self) -> int:
        """The first batch that some rank still needs, of those that have said so."""
        said = zip(self.next_of_rank, self.lives, strict=True)
        return min((number for number, lives in said if lives), default=0)
