"""What a teacher pool counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class PoolStats:
    """Counters of a pool. ``restarts`` are replicas started again; ``rescored`` are batches that died with one.

    Attributes:
        started: whether there is a pool at all; none is started while the label store has all that is needed.
        elastic: whether the number of replicas may change with the students' need.
        growing: whether one more replica is being started.
        grown: replicas that were added; ``shrunk`` were not needed any more or in a student's place, ``lost`` died and
            were not needed.
        mfu: of the replica that scored the last batch, see :mod:`cluster.flops`; none where it is not known.
    """

    started: bool = False
    ready: int = 0
    elastic: bool = False
    growing: bool = False
    grown: int = 0
    shrunk: int = 0
    lost: int = 0
    restarts: int = 0
    rescored: int = 0
    busy_seconds: float = 0.0
    label_bytes: int = 0
    mfu: float | None = None
    last_error: str = ""
