"""Lays documents out as sequences of one length, packed or padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

# Spans that are Python's own numbers at a time; all of them would take more memory than short documents do.
PART = 4096


def _each(spans_P3: npt.NDArray[np.int64]) -> Iterator[list[int]]:
    for start in range(0, len(spans_P3), PART):
        yield from spans_P3[start : start + PART].tolist()


class Layout:
    """Lays spans of documents out as sequences of one length.

    Packed, they lie end to end; the last partial sequence is dropped. Padded, each sequence has one span, or a piece of
    one, and padding behind it; a piece of one token, on which nothing is scored, is dropped.

    Args:
        documents: token ids; at least one.
        length: tokens of a sequence.
    """

    def __init__(self, documents: Sequence[npt.NDArray[np.int32]], length: int, packed: bool) -> None:
        self._documents, self._length, self._packed = documents, length, packed
        # Padding carries no loss and comes last, so any token will do that the model has: the one that ends documents.
        self._pad = int(documents[0][-1])

    def sequences(self, spans_P3: npt.NDArray[np.int64]) -> int:
        """How many sequences some spans make."""
        tokens_P = spans_P3[:, 2] - spans_P3[:, 1]
        if self._packed:
            return int(tokens_P.sum()) // self._length
        return int((tokens_P // self._length + (tokens_P % self._length > 1)).sum())

    def write(self, file: BinaryIO, spans_P3: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Append the sequences' tokens to a file; returns what lies beside them, a row per sequence."""
        return self._write_packed(file, spans_P3) if self._packed else self._write_padded(file, spans_P3)

    def _write_packed(self, file: BinaryIO, spans_P3: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        shape = (self.sequences(spans_P3), self._length)
        starts = np.zeros(shape[0] * shape[1], dtype=np.bool_)
        place = 0
        for document, first, stop in _each(spans_P3):
            if place >= starts.size:
                break
            starts[place] = True
            ids = self._documents[document][first : min(stop, first + starts.size - place)]
            file.write(np.ascontiguousarray(ids, dtype=np.int32).data)
            place += len(ids)
        return starts.reshape(shape)

    def _write_padded(self, file: BinaryIO, spans_P3: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        lengths_N = np.zeros(self.sequences(spans_P3), dtype=np.int32)
        written = 0
        for document, first, stop in _each(spans_P3):
            for begin in range(first, stop, self._length):
                ids = self._documents[document][begin : min(stop, begin + self._length)]
                if len(ids) > 1:
                    row = np.full(self._length, self._pad, dtype=np.int32)
                    row[: len(ids)] = ids
                    file.write(row.data)
                    lengths_N[written] = len(ids)
                    written += 1
        return lengths_N

    def continued(self, beside: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """[sequences, positions]: True where a token belongs to the document of the token before it."""
        continued_NS = ~beside if self._packed else np.arange(self._length) < beside[:, None]
        continued_NS[:, 0] = False
        return continued_NS
