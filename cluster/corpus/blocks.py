"""Divides the held-out text into blocks, the units whose figures an interval may treat as independent."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

# More documents than this share blocks: an interval gains nothing from more, and every commit holds their sums.
MAX_BLOCKS = 256
# Blocks of text that has fewer documents, all of them continued from the training text. Ten to thirty batches are what
# Schmeiser (1982, "Batch size effects in the analysis of simulation output") recommends for batch means.
PIECES = 30


def held_out_blocks(
    tokens_NS: npt.NDArray[np.int32], beside: npt.NDArray[Any], *, packed: bool, continued: bool
) -> npt.NDArray[np.int16]:
    """The block of each token, [N, S], from 0 to at most ``MAX_BLOCKS - 1``.

    The tokens of a document are correlated, so a block holds whole documents; equal documents share one. Where students
    train on the beginning of every held-out document, more of the same documents is what they are measured for: fewer
    than ``PIECES`` of them are divided into that many runs of sequences.

    Args:
        tokens_NS: the held-out sequences that are measured.
        beside: of packed text where documents start, [N, S]; of padded text how many tokens a sequence has, [N].
        continued: whether the training text holds the beginning of every held-out document.
    """
    if packed:
        starts_NS = np.array(beside, dtype=np.bool_)
    else:
        starts_NS = np.zeros(tokens_NS.shape, dtype=np.bool_)
        # What follows a full sequence may be the rest of its document.
        starts_NS[1:, 0] = beside[:-1] < tokens_NS.shape[1]
    starts_NS[0, 0] = True
    firsts = np.flatnonzero(starts_NS)
    known: dict[bytes, int] = {}
    texts = np.split(np.ascontiguousarray(tokens_NS).reshape(-1), firsts[1:])
    number_D = np.array([known.setdefault(text.tobytes(), len(known)) for text in texts])
    if continued and len(known) < PIECES:
        rows_N = np.arange(len(tokens_NS)) * min(PIECES, len(tokens_NS)) // len(tokens_NS)
        return np.repeat(rows_N[:, None], tokens_NS.shape[1], axis=1).astype(np.int16)
    if len(known) > MAX_BLOCKS:
        number_D = number_D * MAX_BLOCKS // len(known)
    return number_D[np.cumsum(starts_NS) - 1].reshape(tokens_NS.shape).astype(np.int16)
