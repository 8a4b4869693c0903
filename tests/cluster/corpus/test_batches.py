"""Batch i is a pure function of (corpus, seed), and no held-out sequence is ever trained on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cluster.corpus.batches import (
    STARTS_FILE,
    TOKENS_FILE,
    Batch,
    Batches,
    CorpusFacts,
    content_address,
    positions_of,
)
from cluster.errors import UserError
from cluster.spec import CorpusSpec

SEQUENCES, LENGTH, SIZE = 50, 8, 4


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Sequence i starts with the token 100 i, so a row says where it came from, and has a document start at i % 8."""
    tokens_NS = np.arange(SEQUENCES, dtype=np.int32)[:, None] * 100 + np.arange(LENGTH, dtype=np.int32)
    np.save(tmp_path / TOKENS_FILE, tokens_NS)
    np.save(tmp_path / STARTS_FILE, np.arange(SEQUENCES)[:, None] % LENGTH == np.arange(LENGTH))
    CorpusFacts(documents=7, tokens=tokens_NS.size, sequences=SEQUENCES, address="a").write(tmp_path)
    return tmp_path


def opened(folder: Path, held_out_batches: int = 2, **fields: Any) -> Batches:
    known = {"paths": ["x"], "sequence_length": LENGTH, "batch_sequences": SIZE, "held_out": 0.2, "epochs": 3}
    return Batches(folder, CorpusSpec.model_validate(known | fields), held_out_batches)


def origins(batches: Batches, numbers: range) -> list[int]:
    return [int(first) // 100 for number in numbers for first in batches.train(number).tokens_BS[:, 0]]


def test_a_batch_is_the_same_whenever_and_in_whatever_order_it_is_read(corpus: Path) -> None:
    one, other = opened(corpus), opened(corpus)
    backwards = {number: other.train(number) for number in reversed(range(one.count))}
    for number in range(one.count):
        assert np.array_equal(one.train(number).tokens_BS, backwards[number].tokens_BS)
        assert one.train(number).number == number


def test_another_seed_gives_another_order_of_training_and_the_same_held_out(corpus: Path) -> None:
    one, other = opened(corpus), opened(corpus, seed=1)
    assert origins(one, range(10)) != origins(other, range(10))
    assert np.array_equal(one.held_out(1).tokens_BS, other.held_out(1).tokens_BS)


def test_every_epoch_has_every_sequence_at_most_once_in_a_new_order(corpus: Path) -> None:
    batches = opened(corpus, batch_sequences=3)
    per_epoch = 40 // 3
    assert batches.count == 3 * per_epoch
    epochs = [origins(batches, range(e * per_epoch, (e + 1) * per_epoch)) for e in range(3)]
    assert [len(set(epoch)) for epoch in epochs] == [39, 39, 39]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_held_out_sequences_are_never_trained_on(corpus: Path) -> None:
    batches = opened(corpus)
    trained = set(origins(batches, range(batches.count)))
    measured = [int(t) // 100 for n in range(2) for t in batches.held_out(n).tokens_BS[:, 0]]
    assert len(set(measured)) == 2 * SIZE
    assert not trained & set(measured)
    assert trained == set(range(40))


def start_of(batch: Batch) -> npt.NDArray[np.int64]:
    """Where in each sequence of the corpus above a document starts."""
    return batch.tokens_BS[:, 0] // 100 % LENGTH


def test_neither_a_sequence_s_nor_a_document_s_last_position_carries_loss_and_all_others_do(corpus: Path) -> None:
    for batch in (opened(corpus).train(0), opened(corpus).held_out(0)):
        wanted = np.ones((SIZE, LENGTH), dtype=np.bool_)
        wanted[:, -1] = False
        for row, start in zip(wanted, start_of(batch), strict=True):
            if start:
                row[start - 1] = False
        assert np.array_equal(batch.loss_mask_BS, wanted)
        assert batch.loss_tokens == wanted.sum()


def test_positions_count_from_each_document_s_start(corpus: Path) -> None:
    for number in range(10):
        batch = opened(corpus).train(number)
        for row, start in zip(batch.positions_BS, start_of(batch), strict=True):
            assert row.tolist() == [*range(start), *range(LENGTH - start)]
        assert batch.packed == bool(start_of(batch).any())


def test_sequences_of_one_document_each_are_not_packed(corpus: Path) -> None:
    np.save(corpus / STARTS_FILE, np.zeros((SEQUENCES, LENGTH), dtype=np.bool_))
    batch = opened(corpus).train(0)
    assert not batch.packed
    assert (batch.positions_BS == np.arange(LENGTH)).all()
    assert batch.loss_tokens == SIZE * (LENGTH - 1)


STARTS = arrays.arrays(np.bool_, st.tuples(st.integers(1, 4), st.integers(1, 12)))


@given(STARTS)
def test_positions_are_those_of_counting_token_by_token(starts_BS: npt.NDArray[np.bool_]) -> None:
    counted = []
    for row in starts_BS:
        places: list[int] = []
        for index, start in enumerate(row):
            places.append(0 if start or index == 0 else places[-1] + 1)
        counted.append(places)
    found = positions_of(starts_BS)
    assert found.tolist() == counted
    assert found.dtype == np.int32


def test_all_batches_have_the_same_number_of_tokens(corpus: Path) -> None:
    batches = opened(corpus, batch_sequences=3)
    every = [*map(batches.train, range(batches.count)), *map(batches.held_out, range(2))]
    for batch in every:
        assert batch.tokens_BS.shape == batch.loss_mask_BS.shape == batch.positions_BS.shape == (3, LENGTH)
        assert (batch.tokens_BS.dtype, batch.positions_BS.dtype) == (np.int32, np.int32)


def test_rows_of_a_batch_are_its_columns_under_the_whole_batch_s_address(corpus: Path) -> None:
    batch = opened(corpus).train(5)
    part = batch.rows(1, 3)
    assert np.array_equal(part.tokens_BS, batch.tokens_BS[1:3])
    assert np.array_equal(part.loss_mask_BS, batch.loss_mask_BS[1:3])
    assert np.array_equal(part.positions_BS, batch.positions_BS[1:3])
    assert (part.number, part.address) == (5, batch.address)
    assert part.loss_tokens == batch.loss_mask_BS[1:3].sum()


def test_a_batch_has_one_address_whenever_it_is_read_and_no_other_batch_has_it(corpus: Path) -> None:
    one, other = opened(corpus), opened(corpus)
    addresses = [one.train(number).address for number in range(one.count)]
    assert [other.train(number).address for number in range(one.count)] == addresses
    held_out = [one.held_out(number).address for number in range(2)]
    assert len({*addresses, *held_out}) == one.count + 2
    assert all(len(address) == 32 and int(address, 16) >= 0 for address in addresses)


def test_held_out_batches_know_the_block_of_each_token_and_training_batches_do_not(corpus: Path) -> None:
    facts = replace(CorpusFacts.read(corpus), held_out=8, held_out_documents=9, cut_documents=1)
    facts.write(corpus)
    batches = opened(corpus)
    first, second = batches.held_out(0), batches.held_out(1)
    assert batches.train(0).blocks_BS is None and first.blocks_BS is not None and second.blocks_BS is not None
    blocks_NS = np.concatenate([first.blocks_BS, second.blocks_BS])
    starts_NS = np.load(corpus / STARTS_FILE)[-8:][: len(blocks_NS)]
    starts_NS[0, 0] = True
    assert np.array_equal(blocks_NS.reshape(-1), np.cumsum(starts_NS) - 1)
    assert np.array_equal(first.rows(1, 3).blocks_BS, first.blocks_BS[1:3])
    assert first.address == content_address(first.tokens_BS, first.loss_mask_BS, first.positions_BS)


def test_the_address_is_that_of_the_batch_s_three_columns(corpus: Path) -> None:
    batch = opened(corpus).train(2)
    columns = (batch.tokens_BS, batch.loss_mask_BS, batch.positions_BS)
    assert batch.address == content_address(*columns)
    for changed in range(3):
        others = [column.copy() for column in columns]
        others[changed][1, 2] ^= 1
        assert content_address(*others) != batch.address


def test_another_place_of_a_document_s_start_gives_another_address(corpus: Path) -> None:
    before = opened(corpus).train(0).address
    np.save(corpus / STARTS_FILE, np.zeros((SEQUENCES, LENGTH), dtype=np.bool_))
    assert opened(corpus).train(0).address != before


def test_an_address_is_the_same_on_every_machine_and_in_every_version() -> None:
    # Written down: labels in a store are found by it.
    assert content_address(np.arange(6, dtype=np.int32).reshape(2, 3)) == "16923790cf74c94f59e14751f0311d8b"


def test_the_shape_and_not_the_memory_layout_shows_in_the_address() -> None:
    column = np.arange(6, dtype=np.int32).reshape(2, 3)
    assert content_address(column.reshape(3, 2)) != content_address(column)
    assert content_address(np.asfortranarray(column)) == content_address(column)
    assert content_address(column[:1], column[1:]) != content_address(column)


@pytest.mark.parametrize(("most", "count"), [(None, 30), (7, 7), (100, 30)])
def test_the_pass_ends_where_the_spec_or_the_corpus_does(corpus: Path, most: int | None, count: int) -> None:
    assert opened(corpus, max_batches=most).count == count


@pytest.mark.parametrize(
    ("fields", "held_out_batches", "parts"),
    [
        ({"batch_sequences": 41}, 0, ["leaves 40 to train on", "one batch takes 41"]),
        ({}, 3, ["10 held out", "evaluation.batches 3 take 12"]),
    ],
)
def test_too_small_a_corpus_is_refused_with_what_there_is_and_what_is_needed(
    corpus: Path, fields: dict[str, Any], held_out_batches: int, parts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        opened(corpus, held_out_batches, **fields)
    wanted = ["7 documents give 50 sequences of 8 tokens", *parts]
    assert [part for part in wanted if part not in str(caught.value)] == []


@pytest.mark.parametrize(("fields", "held_out_batches"), [({"batch_sequences": 40}, 0), ({"batch_sequences": 5}, 2)])
def test_a_corpus_that_is_just_large_enough_is_used_up(
    corpus: Path, fields: dict[str, Any], held_out_batches: int
) -> None:
    batches = opened(corpus, held_out_batches, epochs=1, **fields)
    assert batches.count * fields["batch_sequences"] == 40
    assert all(len(batches.held_out(n).tokens_BS) == 5 for n in range(held_out_batches))
