"""Blocks of the held-out text: whole documents, and never two blocks for one text."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.corpus.blocks import MAX_BLOCKS, PIECES, held_out_blocks


def packed(lengths: list[int], length: int = 8, texts: list[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Documents end to end in sequences; each document's tokens are its own, unless ``texts`` gives two the same."""
    numbers = texts or list(range(len(lengths)))
    tokens = np.concatenate([100 * number + np.arange(n) for n, number in zip(lengths, numbers, strict=True)])
    starts = np.concatenate([np.arange(n) == 0 for n in lengths])
    whole = len(tokens) // length * length
    return tokens[:whole].reshape(-1, length).astype(np.int32), starts[:whole].reshape(-1, length)


def test_a_document_is_one_block_also_across_sequences() -> None:
    tokens_NS, starts_NS = packed([3, 10, 7, 4])
    blocks_NS = held_out_blocks(tokens_NS, starts_NS, packed=True, continued=False)
    assert blocks_NS.reshape(-1).tolist() == [0] * 3 + [1] * 10 + [2] * 7 + [3] * 4
    assert blocks_NS.shape == tokens_NS.shape


def test_equal_documents_share_a_block() -> None:
    tokens_NS, starts_NS = packed([4, 4, 4, 4], texts=[0, 1, 0, 2])
    blocks_NS = held_out_blocks(tokens_NS, starts_NS, packed=True, continued=False)
    assert blocks_NS.reshape(-1)[::4].tolist() == [0, 1, 0, 2]


def test_a_sequence_that_is_not_full_ends_its_document_in_padded_text() -> None:
    tokens_NS = np.arange(40, dtype=np.int32).reshape(5, 8)
    lengths_N = np.array([8, 3, 5, 8, 8])
    blocks_NS = held_out_blocks(tokens_NS, lengths_N, packed=False, continued=False)
    assert blocks_NS[:, 0].tolist() == blocks_NS[:, -1].tolist() == [0, 0, 1, 2, 2]


def test_of_more_documents_than_there_may_be_blocks_neighbours_share_one() -> None:
    tokens_NS, starts_NS = packed([2] * (3 * MAX_BLOCKS))
    blocks_T = held_out_blocks(tokens_NS, starts_NS, packed=True, continued=False).reshape(-1)
    assert np.array_equal(blocks_T, np.repeat(np.arange(MAX_BLOCKS), 6))


@pytest.mark.parametrize("sequences", [12, PIECES, 95])
def test_the_rest_of_a_few_documents_that_are_trained_on_is_cut_into_pieces(sequences: int) -> None:
    tokens_NS, starts_NS = packed([4 * sequences, 4 * sequences])
    blocks_NS = held_out_blocks(tokens_NS, starts_NS, packed=True, continued=True)
    assert len(np.unique(blocks_NS)) == min(PIECES, sequences)
    assert (np.diff(blocks_NS[:, 0]) >= 0).all() and (blocks_NS == blocks_NS[:, :1]).all()
    # New documents are not: they may differ from each other by more than their parts do.
    assert len(np.unique(held_out_blocks(tokens_NS, starts_NS, packed=True, continued=False))) == 2


def test_enough_documents_stay_whole_wherever_their_beginning_is() -> None:
    tokens_NS, starts_NS = packed([8] * (PIECES + 3))
    blocks_NS = held_out_blocks(tokens_NS, starts_NS, packed=True, continued=True)
    assert len(np.unique(blocks_NS)) == PIECES + 3
