"""How much of the held-out text also occurs in the training text, in n-grams of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# As in the contamination analysis of GPT-3 (Brown et al., 2020, appendix C), there in words.
NGRAM = 13
# A sequence with this share of its n-grams in the training text counts as seen, as in that of Llama 2 (Touvron et al.,
# 2023, appendix A.6).
SEEN = 0.8
# Tokens that are hashed at a time.
CHUNK = 1 << 20
_BASE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Overlap:
    """How much held-out text also occurs in training sequences.

    Attributes:
        ngrams: n-grams of 13 tokens inside one held-out document and sequence; of all of them, repeats too.
        known: those that also occur in a training sequence.
        seen: held-out sequences of which at least 80 % of the n-grams are known.
    """

    ngrams: int = 0
    known: int = 0
    seen: int = 0


def overlap(
    train_NS: npt.NDArray[np.int32], held_out_NS: npt.NDArray[np.int32], counted_NS: npt.NDArray[np.bool_]
) -> Overlap:
    """Look every n-gram of the held-out sequences up among those of the training sequences.

    Hashes of 64 bits are compared. Memory is about 40 bytes per held-out token, and a chunk of the training text.

    Args:
        counted_NS: [held-out sequences, positions]; True where a token continues the document of the token before
            it, so False where a document starts and on pads.
    """
    length = held_out_NS.shape[1]
    size = min(NGRAM, length)
    held_NG = _hashes(held_out_NS, size)
    whole_NG = np.ones(held_NG.shape, dtype=np.bool_)
    for offset in range(1, size):
        whole_NG &= counted_NS[:, offset : length - size + 1 + offset]
    wanted_W = np.sort(held_NG[whole_NG])
    known_W = np.zeros(len(wanted_W), dtype=np.bool_)
    # Which lowest bits there are: it leaves few of the training text's hashes to be searched for.
    mask = np.uint64((1 << max(10, (8 * len(wanted_W)).bit_length())) - 1)
    bits = np.zeros(int(mask) + 1, dtype=np.bool_)
    bits[wanted_W & mask] = True
    rows = max(1, CHUNK // length)
    for start in range(0, len(train_NS) if len(wanted_W) else 0, rows):
        hashes = _hashes(train_NS[start : start + rows], size).reshape(-1)
        hashes = hashes[bits[hashes & mask]]
        place = np.searchsorted(wanted_W, hashes)
        place[place == len(wanted_W)] = 0
        known_W[place[wanted_W[place] == hashes]] = True
    # Of equal ones the first was found.
    known_NG = np.isin(held_NG, wanted_W[known_W]) & whole_NG
    ngrams_N, known_N = whole_NG.sum(axis=1), known_NG.sum(axis=1)
    seen = int(((ngrams_N > 0) & (known_N >= SEEN * ngrams_N)).sum())
    return Overlap(int(ngrams_N.sum()), int(known_N.sum()), seen)


def _hashes(tokens_NS: npt.NDArray[np.int32], size: int) -> npt.NDArray[np.uint64]:
    """A polynomial hash of each run of ``size`` tokens in a sequence, modulo 2^64."""
    ids_NS = tokens_NS.astype(np.uint64) + np.uint64(1)
    # Mixed first, for small ids would leave the upper bits of a short polynomial empty.
    ids_NS = (ids_NS ^ (ids_NS << np.uint64(31))) * _BASE
    count = tokens_NS.shape[1] - size + 1
    hashes_NG = np.zeros((len(tokens_NS), count), dtype=np.uint64)
    for offset in range(size):
        hashes_NG = hashes_NG * _BASE + ids_NS[:, offset : offset + count]
    return hashes_NG
