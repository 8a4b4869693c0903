"""Chooses the held-out documents, so that no text is on both sides of the cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Split:
    """Spans of documents on either side, in the documents' order.

    Attributes:
        train_P3, held_out_P3: document, first token, end; int64.
        cut: documents that have a span on both sides.
    """

    train_P3: npt.NDArray[np.int64]
    held_out_P3: npt.NDArray[np.int64]
    cut: int


def repeats(hashes_N: npt.NDArray[np.uint64], documents: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.bool_]:
    """True for each document that has the tokens of an earlier one, so that a collision of hashes drops nothing."""
    _, first_G, group_N = np.unique(hashes_N, return_index=True, return_inverse=True)
    first_N = first_G[group_N]
    repeated_N = first_N != np.arange(len(documents))
    for index in np.flatnonzero(repeated_N).tolist():
        repeated_N[index] = np.array_equal(documents[index], documents[int(first_N[index])])
    return repeated_N


def split_documents(
    hashes_N: npt.NDArray[np.uint64],
    lengths_N: npt.NDArray[np.int64],
    held_out_tokens: int,
    boundary: Callable[[int, int], int],
    least: int = 1,
) -> Split:
    """Hold out the documents with the smallest hashes until they have ``held_out_tokens``.

    A document's place in this order depends on its own text alone. When the corpus grows, the cut stays at about the
    same quantile of the hashes, so nearly all held-out documents of one night are those of the next; and equal texts
    have equal hashes, so all of them are on one side.

    Documents that alone are longer than ``held_out_tokens`` are cut first, by the same share, so that the held-out text
    is not of short documents only. The end is held out, for where a text grows by appending, what was trained on
    is never held out later. A short text with so many copies that together they are longer comes last, and is cut
    where it is needed at all.

    Args:
        lengths_N: tokens of each document.
        held_out_tokens: at least 1.
        boundary: of a document's index and a token's index, the index of a nearby token, no later, that may begin the
            held-out part; between 1 and the token's index.
        least: fewest tokens that a long document is held out with, before the boundary is looked for.
    """
    held_N = np.zeros(len(lengths_N), dtype=np.bool_)
    begins_N = np.zeros(len(lengths_N), dtype=np.int64)
    missing, cut = held_out_tokens, 0
    total = int(lengths_N.sum())
    for group, kind in _groups(hashes_N, lengths_N, held_out_tokens):
        if missing <= 0:
            break
        held_N[group] = True
        if kind != _SHORT:
            # Copies are cut at one place, so that the same text is held out in each.
            length = int(lengths_N[group].min())
            wanted = -(-missing // len(group))
            if kind == _LONG:  # in proportion, but not in pieces so short that their tokens have no context
                wanted = min(wanted, max(-(-length * held_out_tokens // total), least))
            if wanted < length:
                begins_N[group] = boundary(int(group[0]), length - wanted)
                cut += len(group)
        missing -= int((lengths_N[group] - begins_N[group]).sum())
    train = [(np.flatnonzero(~held_N), 0, lengths_N), (np.flatnonzero(begins_N > 0), 0, begins_N)]
    held = np.flatnonzero(held_N)
    train_P3 = np.concatenate([_spans(index, start, stop) for index, start, stop in train])
    return Split(train_P3[np.argsort(train_P3[:, 0])], _spans(held, begins_N, lengths_N), cut)


# Texts that are longer than what is held out, those that are not, and those of which only all copies together are; in
# the order in which they are looked at.
_LONG, _SHORT, _COPIES = range(3)


def _groups(
    hashes_N: npt.NDArray[np.uint64], lengths_N: npt.NDArray[np.int64], held_out_tokens: int
) -> Iterator[tuple[npt.NDArray[np.int64], int]]:
    """The documents of each text, and which kind of text it is."""
    order_N = np.argsort(hashes_N, kind="stable")
    _, first_G, count_G = np.unique(hashes_N[order_N], return_index=True, return_counts=True)
    kind_G = np.where(np.add.reduceat(lengths_N[order_N], first_G) > held_out_tokens, _COPIES, _SHORT)
    kind_G[np.minimum.reduceat(lengths_N[order_N], first_G) > held_out_tokens] = _LONG
    for group in np.argsort(kind_G, kind="stable"):
        yield order_N[first_G[group] : first_G[group] + count_G[group]], int(kind_G[group])


def _spans(
    index_P: npt.NDArray[np.int64], starts_N: npt.NDArray[np.int64] | int, stops_N: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    starts_P = starts_N if isinstance(starts_N, int) else starts_N[index_P]
    return np.stack([index_P, np.broadcast_to(starts_P, index_P.shape), stops_N[index_P]], axis=1).astype(np.int64)
