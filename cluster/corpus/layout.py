"""Lays documents out as sequences of one length, packed or padded."""

from __future__ import annotations

import itertools
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
        begin: a token that each sequence begins with; it belongs to the document that it stands in front of.
    """

    def __init__(
        self, documents: Sequence[npt.NDArray[np.int32]], length: int, packed: bool, begin: int | None = None
    ) -> None:
        self._documents, self._length, self._packed = documents, length, packed
        self._begin = np.array([] if begin is None else [begin], dtype=np.int32)
        # Tokens of documents in one sequence, and fewest of a padded one: something must be scored.
        self._body, self._least = length - len(self._begin), 2 - len(self._begin)
        # Padding carries no loss and comes last, so any token will do that the model has: the one that ends documents.
        self._pad = int(documents[0][-1])

    def sequences(self, spans_P3: npt.NDArray[np.int64]) -> int:
        """How many sequences some spans make."""
        tokens_P = spans_P3[:, 2] - spans_P3[:, 1]
        if self._packed:
            return int(tokens_P.sum()) // self._body
        return int((tokens_P // self._body + (tokens_P % self._body >= self._least)).sum())

    def write(self, file: BinaryIO, spans_P3: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Append the sequences' tokens to a file; returns what lies beside them, a row per sequence."""
        return self._write_packed(file, spans_P3) if self._packed else self._write_padded(file, spans_P3)

    def _write_packed(self, file: BinaryIO, spans_P3: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        shape = (self.sequences(spans_P3), self._body)
        starts = np.zeros(shape[0] * shape[1], dtype=np.bool_)
        place = 0
        for document, first, stop in _each(spans_P3):
            if place >= starts.size:
                break
            starts[place] = True
            ids = self._documents[document][first : min(stop, first + starts.size - place)]
            # Where sequences begin in it; without a begin token it is written in one piece.
            cuts = range(-place % self._body, len(ids), self._body) if len(self._begin) else ()
            for start, end in itertools.pairwise([0, *cuts, len(ids)]):
                self._append(file, ids[start:end], begins=(place + start) % self._body == 0 and end > start)
            place += len(ids)
        starts_NB = starts.reshape(shape)
        # The begin token starts the document, and the document's first token does not any more.
        inner = np.zeros((len(starts_NB), len(self._begin)), dtype=np.bool_)
        return np.concatenate([starts_NB[:, :1], inner, starts_NB[:, 1:]], axis=1)

    def _append(self, file: BinaryIO, ids: npt.NDArray[np.int32], begins: bool) -> None:
        if begins:
            file.write(self._begin.data)
        file.write(np.ascontiguousarray(ids, dtype=np.int32).data)

    def _write_padded(self, file: BinaryIO, spans_P3: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        lengths_N = np.zeros(self.sequences(spans_P3), dtype=np.int32)
        written = 0
        for document, first, stop in _each(spans_P3):
            for place in range(first, stop, self._body):
                ids = self._documents[document][place : min(stop, place + self._body)]
                if len(ids) >= self._least:
                    row = np.full(self._length, self._pad, dtype=np.int32)
                    lengths_N[written] = len(self._begin) + len(ids)
                    row[: lengths_N[written]] = np.concatenate([self._begin, ids])
                    file.write(row.data)
                    written += 1
        return lengths_N

    def continued(self, beside: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """[sequences, positions]: True where a token belongs to the document of the token before it."""
        continued_NS = ~beside if self._packed else np.arange(self._length) < beside[:, None]
        continued_NS[:, 0] = False
        return continued_NS
