"""What the teacher says about a block of tokens, as plain numpy columns: no torch, zero-copy out of Ray's store.

A *kind* is a frozen dataclass of arrays whose first two axes are [sequence, position]. Position ``t`` holds the
teacher's distribution of token ``t + 1``. The stream and the trainers carry a kind without asking which it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt

L = TypeVar("L", bound="Labels")


class Labels:
    """Base of the kinds: every field is an array over [sequence, position, ...]."""

    @property
    def sequences(self) -> int:
        """Sequences in this block."""
        return int(getattr(self, fields(self)[0].name).shape[0])  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        """Bytes that the columns take."""
        return sum(getattr(self, f.name).nbytes for f in fields(self))  # type: ignore[arg-type]

    def rows(self, start: int, stop: int) -> Self:
        """The sequences ``start`` to ``stop`` as a view."""
        return type(self)(**{f.name: getattr(self, f.name)[start:stop] for f in fields(self)})  # type: ignore[arg-type]


def joined(blocks: Sequence[L]) -> L:
    """Consecutive blocks of one kind as one; no copy when there is only one."""
    if len(blocks) == 1:
        return blocks[0]
    names = [f.name for f in fields(blocks[0])]  # type: ignore[arg-type]
    return type(blocks[0])(**{name: np.concatenate([getattr(b, name) for b in blocks]) for name in names})


@dataclass(frozen=True)
class TopK(Labels):
    """The K likeliest tokens and the mass of all others, at temperature T.

    Attributes:
        ids_BSK: token ids, likeliest first; uint16 where the vocabulary allows, else int32.
        logprobs_BSK: their log-probabilities in nats, float32; never renormalised.
        log_tail_BS: log of the mass outside the K, float32; ``exp(logprobs).sum() + exp(log_tail) == 1``.
    """

    ids_BSK: npt.NDArray[np.integer]
    logprobs_BSK: npt.NDArray[np.float32]
    log_tail_BS: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Hidden(Labels):
    """The teacher's last hidden state: with the teacher's head, the exact distribution.

    Attributes:
        hidden_BSD: bfloat16 bits held as int16, for numpy has no bfloat16 (float16 would overflow); a float32
            teacher keeps float32.
    """

    hidden_BSD: npt.NDArray[np.int16] | npt.NDArray[np.float32]


def id_dtype(vocabulary: int) -> type[np.uint16] | type[np.int32]:
    """The smallest integer type that holds every token id."""
    return np.uint16 if vocabulary <= 2**16 else np.int32
