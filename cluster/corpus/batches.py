"""Numbered batches over packed tokens: batch ``i`` is a pure function of (corpus, seed).

The packed tokens lie in one ``.npy`` file of [sequence, position] that is mapped, not read, so opening a corpus
costs nothing and a batch costs its own bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.errors import UserError
from cluster.spec import CorpusSpec

# Folder of the packed corpus in a run's folder, and what lies in it.
CORPUS_FOLDER = "corpus"
TOKENS_FILE = "tokens.npy"
STARTS_FILE = "starts.npy"
FACTS_FILE = "corpus.json"


@dataclass(frozen=True)
class CorpusFacts:
    """What is known of a packed corpus.

    Attributes:
        documents: texts that were read and were not empty.
        tokens: tokens kept, after the last partial sequence was dropped.
        sequences: packed sequences.
        address: over the packed tokens and the documents' starts, the corpus' content address.
    """

    documents: int
    tokens: int
    sequences: int
    address: str

    def write(self, folder: Path) -> None:
        """Put the facts beside the tokens, whole or not at all."""
        aside = folder / f".{FACTS_FILE}.part"
        aside.write_text(json.dumps(asdict(self)))
        aside.replace(folder / FACTS_FILE)

    @staticmethod
    def read(folder: Path) -> CorpusFacts:
        """The facts that lie beside the tokens."""
        return CorpusFacts(**json.loads((folder / FACTS_FILE).read_text()))


@dataclass(frozen=True)
class Batch:
    """One numbered batch.

    Attributes:
        number: its place in the pass, from 0.
        tokens_BS: token ids, int32.
        loss_mask_BS: True where a position carries loss. Position t is scored on token t + 1, so a sequence's last
            position never does, nor a document's last.
        positions_BS: each token's place in its own document, int32. Documents that are packed into one sequence do
            not see each other; a document that goes on from the sequence before begins anew.
        address: 32 hex digits over all three columns of the whole batch, its content address.
    """

    number: int
    tokens_BS: npt.NDArray[np.int32]
    loss_mask_BS: npt.NDArray[np.bool_]
    positions_BS: npt.NDArray[np.int32]
    address: str

    @property
    def loss_tokens(self) -> int:
        """Positions that carry loss, in the whole global batch: what a loss is divided by."""
        return int(self.loss_mask_BS.sum())

    @property
    def packed(self) -> bool:
        """Whether some sequence holds more than one document."""
        return bool((self.positions_BS[:, 1:] == 0).any())

    def rows(self, start: int, stop: int) -> Batch:
        """The sequences ``start`` to ``stop``."""
        part = slice(start, stop)
        return replace(
            self,
            tokens_BS=self.tokens_BS[part],
            loss_mask_BS=self.loss_mask_BS[part],
            positions_BS=self.positions_BS[part],
        )


def positions_of(starts_BS: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Each token's place in its document, from where documents start; a sequence's first token always starts one."""
    place_S = np.arange(starts_BS.shape[1], dtype=np.int32)
    return place_S - np.maximum.accumulate(np.where(starts_BS, place_S, 0), axis=1)


def content_address(*columns: npt.NDArray[Any]) -> str:
    """32 hex digits over the bytes and the shape of some columns."""
    digest = hashlib.sha256(repr([column.shape for column in columns]).encode())
    for column in columns:
        digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()[:32]


class Batches:
    """The training batches and the held-out batches of one packed corpus.

    Documents were shuffled before they were packed, so the last ``held_out`` share of the sequences is a fair
    sample, and at most one document lies on both sides of the cut.

    Raises:
        UserError: too few sequences for one training batch and the held-out batches that were asked for.
    """

    def __init__(self, folder: Path, spec: CorpusSpec, held_out_batches: int) -> None:
        self.facts = CorpusFacts.read(folder)
        self._tokens_NS = np.load(folder / TOKENS_FILE, mmap_mode="r")
        self._starts_NS = np.load(folder / STARTS_FILE, mmap_mode="r")
        self._size, self._seed = spec.batch_sequences, spec.seed
        total = len(self._tokens_NS)
        held_out = max(1, round(total * spec.held_out))
        self._train = total - held_out
        self._per_epoch = self._train // self._size
        self.held_out_count = held_out_batches
        if self._per_epoch == 0 or held_out < held_out_batches * self._size:
            raise UserError(
                f"corpus: {self.facts.documents} documents give {total} sequences of {spec.sequence_length} tokens; "
                f"held_out {spec.held_out} leaves {self._train} to train on and {held_out} held out, but one batch "
                f"takes {self._size} and evaluation.batches {held_out_batches} take {held_out_batches * self._size}; "
                f"give more text, or lower corpus.sequence_length, corpus.batch_sequences or evaluation.batches"
            )
        self.count = self._per_epoch * spec.epochs
        if spec.max_batches is not None:
            self.count = min(self.count, spec.max_batches)
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None

    def _batch(self, number: int, sequences: npt.NDArray[np.int64]) -> Batch:
        tokens_BS = np.ascontiguousarray(self._tokens_NS[sequences])
        loss_mask_BS = np.ones(tokens_BS.shape, dtype=np.bool_)
        loss_mask_BS[:, -1] = False
        starts_BS = self._starts_NS[sequences]
        loss_mask_BS[:, :-1] &= ~starts_BS[:, 1:]
        positions_BS = positions_of(starts_BS)
        address = content_address(tokens_BS, loss_mask_BS, positions_BS)
        return Batch(number, tokens_BS, loss_mask_BS, positions_BS, address)

    def train(self, number: int) -> Batch:
        """Training batch ``number``, from 0 to ``count - 1``."""
        epoch, index = divmod(number, self._per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self._seed, epoch)).permutation(self._train))
        return self._batch(number, self._order[1][index * self._size : (index + 1) * self._size])

    def held_out(self, number: int) -> Batch:
        """Held-out batch ``number``, from 0 to ``held_out_count - 1``."""
        first = self._train + number * self._size
        return self._batch(number, np.arange(first, first + self._size))
