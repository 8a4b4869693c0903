"""What the stream hands out: a rank's part of a batch, and a snapshot of the pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import ray

from cluster.corpus.batches import Batch
from cluster.stream.consumer import Consumer
from cluster.stream.window import Window
from cluster.teacher.figures import PoolStats

if TYPE_CHECKING:
    # At run time the display would load the teacher's pool with it.
    from cluster.stream.source import LabelSource


class HeldError(Exception):
    """The pass is being held: there is no further batch for now, and what has been learnt is to be put away."""


@dataclass(frozen=True)
class Delivery:
    """What one rank gets of one batch.

    Attributes:
        batch: this rank's rows.
        labels: references to the label blocks of the same rows, in order.
        loss_tokens: positions that carry loss in the whole global batch.
        trace: the one that the batch is part of, see :mod:`cluster.tracing`.
    """

    batch: Batch
    labels: list[ray.ObjectRef]
    loss_tokens: int
    trace: str = ""

    @classmethod
    def of(cls, batch: Batch, blocks: list[ray.ObjectRef], rank: int, ranks: int, trace: str = "") -> Self:
        """One rank's share of a whole batch and of its label blocks."""
        rows, share = len(batch.tokens_BS) // ranks, len(blocks) // ranks
        own = batch.rows(rank * rows, (rank + 1) * rows)
        return cls(own, blocks[rank * share : (rank + 1) * share], batch.loss_tokens, trace)


@dataclass(frozen=True)
class StreamStats:
    """A snapshot of the pass, for the progress display and for tests.

    Attributes:
        scored: how often the teacher scored each batch.
        read: how often each batch was read from the store.
        delivered: batches that rank 0 of each student has been given.
        waiting: students that wait for labels now; ``waited_s`` is how long each has waited in all.
        blocked_by: the slowest student, when the window is full because of it.
        behind: per active student the batches that the fastest is ahead of it.
        unsaved: batches that the store has not taken yet.
    """

    total: int
    scored: dict[int, int]
    read: dict[int, int]
    delivered: dict[str, int]
    waiting: list[str]
    waited_s: dict[str, float]
    blocked_by: str | None
    behind: dict[str, int]
    window_used: int
    unsaved: int
    pool: PoolStats
    error: str | None

    @classmethod
    def of(
        cls, consumers: Mapping[str, Consumer], window: Window, source: LabelSource, idle: bool, error: str | None
    ) -> Self:
        """Of a stream that has begun.

        Args:
            idle: whether there is nothing to fetch, and nothing is on its way.
        """
        active = {name: c for name, c in consumers.items() if c.active and c.seen}
        slowest = min(active, key=lambda name: active[name].position, default=None)
        fastest = max((c.position for c in active.values()), default=0)
        left = slowest is not None and active[slowest].position + window.size < window.total
        return cls(
            total=window.total,
            scored=source.log.counts(),
            read=dict(source.read),
            delivered={name: c.delivered for name, c in consumers.items()},
            waiting=[name for name, c in active.items() if c.waiting],
            waited_s={name: c.waited_s for name, c in consumers.items()},
            blocked_by=slowest if idle and left and not window.stored else None,
            behind={name: fastest - c.position for name, c in active.items()},
            window_used=len(window.ready),
            unsaved=source.unsaved,
            pool=source.stats,
            error=error,
        )

    @classmethod
    def unstarted(cls, total: int, error: str | None) -> Self:
        """Of a stream that could not begin, and why."""
        return cls(total, {}, {}, {}, [], {}, None, {}, 0, 0, PoolStats(), error)
