"""Numbered batches over tokenised text: batch ``i`` is a pure function of (corpus, seed).

The tokens lie in one ``.npy`` file of [sequence, position] that is mapped, not read, so opening a corpus
costs nothing and a batch costs its own bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.corpus.blocks import held_out_blocks
from cluster.corpus.files import skipped_line, unusable_reasons
from cluster.errors import UserError
from cluster.spec import CorpusSpec

# Folder of the packed corpus in a run's folder, and what lies in it.
CORPUS_FOLDER = "corpus"
TOKENS_FILE = "tokens.npy"
# Of a packed corpus: where documents start. Of a padded one: tokens of each sequence, the rest of it is padding.
STARTS_FILE = "starts.npy"
LENGTHS_FILE = "lengths.npy"
FACTS_FILE = "corpus.json"


@dataclass(frozen=True)
class CorpusFacts:
    """What is known of a tokenised corpus.

    Attributes:
        documents: texts that were read and used; those without text and dropped repeats are not among them.
        tokens: tokens kept, without padding.
        sequences: all of them, the held-out ones included.
        address: over the tokens, what lies beside them and the place of the cut, the corpus' content address.
        held_out: sequences that no student trains on, the last ones; None in a corpus of before documents were split.
        held_out_documents: documents that they are from; ``cut_documents`` of these have their beginning on the
            training side.
        repeats: documents with the text of an earlier one; ``repeats_dropped`` tells whether they were dropped.
        blank: rows and files without text.
        spelled: documents whose text spells out a special token.
        dropped_tokens: of the last partial sequence on either side, and of pieces of one token in a padded corpus.
        packed: sequences hold several documents, end to end; else each holds one, or a piece of one, and padding.
        pad_tokens: tokens of padding.
        ngrams, ngrams_known, held_out_seen: see :class:`~cluster.corpus.overlap.Overlap`.
        skipped: files that were not read, by reason, see :class:`~cluster.corpus.files.CorpusFiles`.
        unusable: rows that were left out, by reason, see :class:`~cluster.corpus.unusable.Unusable`;
            ``first_unusable`` names the file and line of the first of each.
        bos: what the begin token is in front of: ``never``, ``document`` or ``sequence``. The address covers it by the
            tokens, so that text without begin tokens keeps its address.
    """

    documents: int
    tokens: int
    sequences: int
    address: str
    held_out: int | None = None
    held_out_documents: int = 0
    cut_documents: int = 0
    repeats: int = 0
    repeats_dropped: bool = False
    blank: int = 0
    spelled: int = 0
    dropped_tokens: int = 0
    packed: bool = True
    pad_tokens: int = 0
    ngrams: int = 0
    ngrams_known: int = 0
    held_out_seen: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    unusable: dict[str, int] = field(default_factory=dict)
    first_unusable: dict[str, str] = field(default_factory=dict)
    bos: str = "never"

    def lines(self) -> list[str]:
        """What a person should know of the corpus, a line each."""
        told = [f"{_count(self.documents, 'document')}, {self.tokens:,} tokens in {_count(self.sequences, 'sequence')}"]
        for count, what in (
            (self.repeats, "repeats, dropped" if self.repeats_dropped else "repeats, kept"),
            (self.blank, "without text"),
            (self.spelled, "with the text of special tokens"),
            (self.dropped_tokens, "tokens dropped"),
        ):
            told += [f"{count:,} {what}"] if count else []
        lines = ["; ".join(told)]
        if self.held_out is not None:
            cut = f" ({self.cut_documents:,} cut)" if self.cut_documents else ""
            overlap = "too short for 13-grams to compare"
            if self.ngrams:
                overlap = (
                    f"{100 * self.ngrams_known / self.ngrams:.1f} % of their 13-grams also occur in the training text, "
                    f"{_count(self.held_out_seen, 'sequence')} nearly whole"
                )
            source = f"{_count(self.held_out, 'sequence')} of {_count(self.held_out_documents, 'document')}{cut}"
            lines.append(f"held out: {source}; {overlap}")
        if not self.packed:
            share = 100 * self.pad_tokens / (self.pad_tokens + self.tokens)
            lines.append(f"not packed: {self.pad_tokens:,} tokens of padding ({share:.0f} %)")
        if self.bos != "never":
            lines.append(f"a begin token (BOS) in front of each {self.bos}")
        if self.unusable:
            reasons = unusable_reasons(self.unusable, self.first_unusable)
            lines.append(f"{_count(sum(self.unusable.values()), 'row')} unusable, left out ({reasons})")
        return lines + [line for line in [skipped_line(self.skipped)] if line]

    def require_padded(self, reason: str) -> None:
        """Refuse to resume a run with packed text, see :func:`cluster.packing.architecture_packing` for the reason.

        Raises:
            UserError: the text was packed when the run was begun.
        """
        if self.packed:
            raise UserError(f"--resume: the run was begun with packed text; {reason}; start a new run without --resume")

    def write(self, folder: Path) -> None:
        """Put the facts beside the tokens, whole or not at all."""
        aside = folder / f".{FACTS_FILE}.part"
        aside.write_text(json.dumps(asdict(self)))
        aside.replace(folder / FACTS_FILE)

    @staticmethod
    def read(folder: Path) -> CorpusFacts:
        """The facts that lie beside the tokens."""
        return CorpusFacts(**json.loads((folder / FACTS_FILE).read_text()))


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


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
        address: 32 hex digits over the three columns above of the whole batch, its content address.
        blocks_BS: of a held-out batch the block of each token, see :func:`~cluster.corpus.blocks.held_out_blocks`.
    """

    number: int
    tokens_BS: npt.NDArray[np.int32]
    loss_mask_BS: npt.NDArray[np.bool_]
    positions_BS: npt.NDArray[np.int32]
    address: str
    blocks_BS: npt.NDArray[np.int16] | None = None

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
            blocks_BS=None if self.blocks_BS is None else self.blocks_BS[part],
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
    """The training batches and the held-out batches of one corpus.

    The held-out sequences are the last ones; see :func:`cluster.corpus.split.split_documents` for how their documents
    were chosen.

    Raises:
        UserError: too few sequences for one training batch and the held-out batches that were asked for.
    """

    def __init__(self, folder: Path, spec: CorpusSpec, held_out_batches: int) -> None:
        self.facts = CorpusFacts.read(folder)
        self._tokens_NS = np.load(folder / TOKENS_FILE, mmap_mode="r")
        beside = STARTS_FILE if self.facts.packed else LENGTHS_FILE
        self._beside = np.load(folder / beside, mmap_mode="r")
        self._size, self._seed = spec.batch_sequences, spec.seed
        total = len(self._tokens_NS)
        # A run that began before documents were split keeps the sequences that it held out.
        held_out = max(1, round(total * spec.held_out)) if self.facts.held_out is None else self.facts.held_out
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
        beside = self._beside[sequences]
        if self.facts.packed:
            loss_mask_BS[:, :-1] &= ~beside[:, 1:]
            positions_BS = positions_of(beside)
        else:
            place_S = np.arange(tokens_BS.shape[1], dtype=np.int32)
            # By length: padding has the id of some token.
            loss_mask_BS &= place_S < beside[:, None] - 1
            positions_BS = np.tile(place_S, (len(tokens_BS), 1))
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
        first = number * self._size
        batch = self._batch(number, self._train + np.arange(first, first + self._size))
        return replace(batch, blocks_BS=self._blocks_NS[first : first + self._size])

    @cached_property
    def _blocks_NS(self) -> npt.NDArray[np.int16]:
        """Of the held-out sequences that are measured."""
        measured = slice(self._train, self._train + self.held_out_count * self._size)
        continued = self.facts.cut_documents == self.facts.held_out_documents
        tokens_NS, beside = self._tokens_NS[measured], self._beside[measured]
        return held_out_blocks(tokens_NS, beside, packed=self.facts.packed, continued=continued)
