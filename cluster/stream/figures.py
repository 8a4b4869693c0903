"""What the stream hands out: a rank's part of a batch, and a snapshot of the pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import ray

from cluster.corpus.batches import Batch
from cluster.teacher.pool import PoolStats


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
    def unstarted(cls, total: int, error: str | None) -> Self:
        """Of a stream that could not begin, and why."""
        return cls(total, {}, {}, {}, [], {}, None, {}, 0, 0, PoolStats(), error)
