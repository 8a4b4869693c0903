"""What the teacher says about a block of tokens, as plain numpy columns: no torch.

A *kind* is a frozen dataclass whose columns hold one row per loss token, in the order of the block's loss mask.
Position ``t`` of a sequence holds the teacher's distribution of token ``t + 1``. The stream, the store and the
trainers carry a kind without asking which it is; :mod:`cluster.labels.make` makes it, :mod:`cluster.labels.wire`
writes and reads it, and the losses turn it into a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

L = TypeVar("L", bound="Labels")

# The least log-probability that a top-k label can say, in nats: e^-32 is 1e-14.
LOGPROB_RANGE = 32.0
_CODES = 65535


def encode_logprobs(logprobs: npt.NDArray[np.floating]) -> npt.NDArray[np.uint16]:
    """Log-probabilities as 16 bits: the root of their distance from 0, so that likely tokens are the most exact.

    The rounding error is at most ``sqrt(32 x) / 65535`` nats at ``x`` nats below 0: 9e-5 at 1, 3e-4 at 10.
    """
    share = np.clip(np.negative(logprobs, dtype=np.float32) / LOGPROB_RANGE, 0.0, 1.0)
    return np.rint(np.sqrt(share) * _CODES).astype(np.uint16)


def decode_logprobs(codes: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Undo :func:`encode_logprobs`."""
    root = codes.astype(np.float32) / np.float32(_CODES)
    return root * root * np.float32(-LOGPROB_RANGE)


@dataclass(frozen=True)
class Labels:
    """Base of the kinds.

    Attributes:
        loss_mask_BS: True where a position carries loss; the columns hold these positions' rows and no others.
        vocabulary: the tokenizer's real size.
        temperature: T that the distributions were made at; 1 for the kinds that hold logits or hidden states.
    """

    loss_mask_BS: npt.NDArray[np.bool_]
    vocabulary: int
    temperature: float

    @classmethod
    def columns(cls) -> list[str]:
        """Names of the columns: the fields that have one row per loss token."""
        return [f.name for f in fields(cls) if f.name not in _ABOUT_ALL]

    @property
    def sequences(self) -> int:
        """Sequences in this block."""
        return len(self.loss_mask_BS)

    @property
    def tokens(self) -> int:
        """Loss tokens in this block."""
        return int(self._first_token[-1])

    @cached_property
    def _first_token(self) -> npt.NDArray[np.int64]:
        """The row at which each sequence begins, and the number of rows."""
        return np.concatenate([[0], self.loss_mask_BS.sum(-1).cumsum()])

    def rows(self, start: int, stop: int) -> Self:
        """The sequences ``start`` to ``stop`` as a view."""
        part = slice(self._first_token[start], self._first_token[stop])
        columns = {name: getattr(self, name)[part] for name in self.columns()}
        return replace(self, loss_mask_BS=self.loss_mask_BS[start:stop], **columns)

    def sums(self) -> dict[str, float]:
        """What can be said of these labels' quality, summed over loss tokens; see each kind."""
        return {}


_ABOUT_ALL = frozenset(f.name for f in fields(Labels)) | {"draws"}


def joined(blocks: Sequence[L]) -> L:
    """Consecutive blocks of one kind as one; no copy when there is only one."""
    if len(blocks) == 1:
        return blocks[0]
    names = ["loss_mask_BS", *blocks[0].columns()]
    whole: dict[str, Any] = {name: np.concatenate([getattr(block, name) for block in blocks]) for name in names}
    return replace(blocks[0], **whole)


@dataclass(frozen=True)
class TopK(Labels):
    """The K likeliest tokens and the mass of all others, at temperature T.

    Attributes:
        ids_TK: token ids, likeliest first.
        codes_TK: their log-probabilities as :func:`encode_logprobs` keeps them.
        log_tail_T: log of the mass outside the K, float32 nats; finite also where nothing is left.
    """

    ids_TK: npt.NDArray[np.unsignedinteger]
    codes_TK: npt.NDArray[np.uint16]
    log_tail_T: npt.NDArray[np.float32]

    def buckets(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Log-probabilities [T, K] and log tail mass [T] in nats, whose K + 1 masses are 1 together.

        The 16 bits round each by itself, so their sum is off by some 1e-4; that is shared out over all buckets alike.
        """
        logprobs_TK = decode_logprobs(self.codes_TK)
        total_T = np.exp(logprobs_TK).sum(-1) + np.exp(self.log_tail_T)
        log_total_T = np.log(total_T, dtype=np.float32)
        return logprobs_TK - log_total_T[:, None], self.log_tail_T - log_total_T

    def sums(self) -> dict[str, float]:
        """``kept_mass``: what the K hold of the teacher's mass. ``log_tail``: log of what they leave, in nats."""
        tail_T = np.exp(self.log_tail_T, dtype=np.float64)
        return {
            "kept_mass": float((1.0 - tail_T).sum()),
            "log_tail": float(self.log_tail_T.sum(dtype=np.float64)),
        }


@dataclass(frozen=True)
class Sampled(Labels):
    """N systematic draws from the teacher's distribution at temperature T, equal ids counted together.

    Attributes:
        ids_TN: the ids that were drawn, in rising order; filled up with 0.
        counts_TN: how often each was drawn, N in all; 0 where ``ids_TN`` is filled up.
        entropy_T: the distribution's entropy H(p), float32 nats.
        draws: N.
    """

    ids_TN: npt.NDArray[np.unsignedinteger]
    counts_TN: npt.NDArray[np.uint16]
    entropy_T: npt.NDArray[np.float32]
    draws: int

    def sums(self) -> dict[str, float]:
        """``unique_ids``: different ids drawn. ``teacher_entropy``: H(p) in nats."""
        return {
            "unique_ids": float(np.count_nonzero(self.counts_TN)),
            "teacher_entropy": float(self.entropy_T.sum(dtype=np.float64)),
        }


@dataclass(frozen=True)
class Hidden(Labels):
    """The teacher's last hidden state: with the teacher's head, the exact distribution at any T.

    Attributes:
        hidden_TD: bfloat16 bits held as uint16, for numpy has no bfloat16 (float16 would overflow); a float32
            teacher keeps float32.
    """

    hidden_TD: npt.NDArray[np.uint16] | npt.NDArray[np.float32]


@dataclass(frozen=True)
class Dense(Labels):
    """The teacher's logits for the whole vocabulary.

    Attributes:
        logits_TV: in the same two precisions as :class:`Hidden`.
    """

    logits_TV: npt.NDArray[np.uint16] | npt.NDArray[np.float32]


KINDS: dict[str, type[Labels]] = {"topk": TopK, "sampled": Sampled, "hidden": Hidden, "dense": Dense}
