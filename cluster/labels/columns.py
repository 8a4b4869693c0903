"""How each kind's columns become bytes and are read back; :mod:`cluster.labels.wire` puts the header before them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.errors import LabelError
from cluster.labels.bits import (
    bits_for,
    pack,
    pack_rising,
    packed_size,
    rising_size,
    smallest_uint,
    unpack,
    unpack_rising,
)
from cluster.labels.kinds import Dense, Hidden, Labels, Sampled, TopK
from cluster.spec.labels import MAX_DRAWS

Bytes = npt.NDArray[np.uint8]

# numpy has no bfloat16: its bits are kept as uint16.
FLOATS: dict[int, type[np.generic]] = {2: np.uint16, 4: np.float32}


@dataclass(frozen=True)
class Shape:
    """What a reader must know of a block before it can cut its columns.

    Attributes:
        tokens: loss tokens, the rows of every column.
        width: K, N or D; the vocabulary for dense labels.
        items: different ids in all, for sampled labels; else 0.
        floats: 2 for bfloat16, 4 for float32; what hidden states and logits are kept in.
    """

    tokens: int
    vocabulary: int
    width: int
    items: int = 0
    floats: int = 4


@dataclass(frozen=True)
class Columns:
    """A block's columns as bytes, with the shape that they are read back by."""

    shape: Shape
    parts: list[Bytes]


def _raw(array: npt.NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


class Reader:
    """Takes columns off a body, one after the other."""

    def __init__(self, body: Bytes) -> None:
        self._body, self._at = body, 0

    @property
    def rest(self) -> int:
        """Bytes that no column has taken."""
        return self._body.size - self._at

    def take(self, size: int) -> Bytes:
        """The next column's bytes."""
        start = self._at
        self._at += size + (-size % 8)
        if self._at > self._body.size:
            raise LabelError(f"label block is cut short: its columns take {self._at} bytes, it has {self._body.size}")
        return self._body[start : start + size]

    def array(self, dtype: Any, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """The next column as an array, without a copy."""
        wide = np.dtype(dtype)
        return self.take(int(np.prod(shape)) * wide.itemsize).view(wide).reshape(shape)

    def ids(self, count: int, vocabulary: int) -> npt.NDArray[np.unsignedinteger]:
        """The next column as token ids.

        Raises:
            LabelError: an id that the vocabulary does not have.
        """
        bits = bits_for(vocabulary)
        ids = unpack(self.take(packed_size(count, bits)), count, bits)
        if count and int(ids.max()) >= vocabulary:
            raise LabelError(f"label block has token id {int(ids.max())}; the vocabulary has {vocabulary} tokens")
        return ids


def _topk_columns(labels: TopK) -> Columns:
    shape = Shape(labels.tokens, labels.vocabulary, labels.ids_TK.shape[1])
    ids = pack(labels.ids_TK.reshape(-1), bits_for(labels.vocabulary))
    return Columns(shape, [ids, _raw(labels.codes_TK), _raw(labels.log_tail_T)])


def _read_topk(read: Reader, shape: Shape) -> dict[str, Any]:
    ids = read.ids(shape.tokens * shape.width, shape.vocabulary)
    return {
        "ids_TK": ids.reshape(shape.tokens, shape.width),
        "codes_TK": read.array(np.uint16, (shape.tokens, shape.width)),
        "log_tail_T": read.array(np.float32, (shape.tokens,)),
    }


def _sampled_columns(labels: Sampled) -> Columns:
    drawn_TN = labels.counts_TN > 0
    ids_U, counts_U = labels.ids_TN[drawn_TN], labels.counts_TN[drawn_TN].astype(np.int64)
    # Each token has N draws, so its draws lie at N bits of their own: no offsets are needed.
    begins = np.zeros(labels.tokens * labels.draws, dtype=np.uint8)
    begins[counts_U.cumsum() - counts_U] = 1
    # A token's ids rise, and with its row before them so do all ids of the block: that is what makes them small.
    row_U = np.repeat(np.arange(labels.tokens), drawn_TN.sum(-1))
    ids = pack_rising(row_U * labels.vocabulary + ids_U, labels.tokens * labels.vocabulary)
    parts = [ids, np.packbits(begins, bitorder="little"), _raw(labels.entropy_T)]
    return Columns(Shape(labels.tokens, labels.vocabulary, labels.draws, items=ids_U.size), parts)


def _read_sampled(read: Reader, shape: Shape) -> dict[str, Any]:
    draws, total = shape.width, shape.tokens * shape.width
    if not 1 <= draws <= MAX_DRAWS:
        raise LabelError(f"label block is damaged: it says {draws} draws a token; 1 to {MAX_DRAWS} are allowed")
    if not shape.vocabulary:
        raise LabelError("label block is damaged: it says that its vocabulary has no token")
    universe = shape.tokens * shape.vocabulary
    at_U = unpack_rising(read.take(rising_size(shape.items, universe)), shape.items, universe)
    begins = np.unpackbits(read.take((total + 7) // 8), count=total, bitorder="little")
    first_U = np.flatnonzero(begins)
    row_U = first_U // draws
    together = at_U.size == first_U.size == shape.items and bool(begins[::draws].all())
    if not together or (at_U // shape.vocabulary != row_U).any() or (np.diff(at_U) <= 0).any():
        raise LabelError("label block is damaged: its draws and its ids do not belong together")
    drawn_TN = np.arange(draws) < np.bincount(row_U, minlength=shape.tokens)[:, None]
    ids_U = at_U - row_U * shape.vocabulary
    ids_TN = np.zeros((shape.tokens, draws), dtype=smallest_uint(bits_for(shape.vocabulary)))
    counts_TN = np.zeros((shape.tokens, draws), dtype=np.uint16)
    ids_TN[drawn_TN], counts_TN[drawn_TN] = ids_U, np.diff(first_U, append=total)
    entropy_T = read.array(np.float32, (shape.tokens,))
    return {"ids_TN": ids_TN, "counts_TN": counts_TN, "entropy_T": entropy_T, "draws": draws}


def _hidden_columns(labels: Hidden) -> Columns:
    width, floats = labels.hidden_TD.shape[1], labels.hidden_TD.itemsize
    return Columns(Shape(labels.tokens, labels.vocabulary, width, floats=floats), [_raw(labels.hidden_TD)])


def _read_hidden(read: Reader, shape: Shape) -> dict[str, Any]:
    return {"hidden_TD": read.array(FLOATS[shape.floats], (shape.tokens, shape.width))}


def _dense_columns(labels: Dense) -> Columns:
    floats = labels.logits_TV.itemsize
    return Columns(Shape(labels.tokens, labels.vocabulary, labels.vocabulary, floats=floats), [_raw(labels.logits_TV)])


def _read_dense(read: Reader, shape: Shape) -> dict[str, Any]:
    return {"logits_TV": read.array(FLOATS[shape.floats], (shape.tokens, shape.vocabulary))}


_WRITERS: dict[type[Labels], Callable[[Any], Columns]] = {
    TopK: _topk_columns,
    Sampled: _sampled_columns,
    Hidden: _hidden_columns,
    Dense: _dense_columns,
}
_READERS: dict[type[Labels], Callable[[Reader, Shape], dict[str, Any]]] = {
    TopK: _read_topk,
    Sampled: _read_sampled,
    Hidden: _read_hidden,
    Dense: _read_dense,
}


def columns_of(labels: Labels) -> Columns:
    """The columns of a block as bytes."""
    return _WRITERS[type(labels)](labels)


def read_columns(kind: type[Labels], read: Reader, shape: Shape) -> dict[str, Any]:
    """Undo :func:`columns_of`: the fields of a kind that are its own.

    Raises:
        LabelError: the bytes are too few, or cannot be those of such a block.
    """
    return _READERS[kind](read, shape)
