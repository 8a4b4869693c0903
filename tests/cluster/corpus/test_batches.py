"""Batch i is a pure function of (corpus, seed), and no held-out sequence is ever trained on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.corpus.batches import TOKENS_FILE, Batches, CorpusFacts
from cluster.errors import UserError
from cluster.spec import CorpusSpec

SEQUENCES, LENGTH, SIZE = 50, 8, 4


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Sequence i starts with the token 100 i, so a row says where it came from."""
    tokens_NS = np.arange(SEQUENCES, dtype=np.int32)[:, None] * 100 + np.arange(LENGTH, dtype=np.int32)
    np.save(tmp_path / TOKENS_FILE, tokens_NS)
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


def test_the_last_position_carries_no_loss_and_all_others_do(corpus: Path) -> None:
    for batch in (opened(corpus).train(0), opened(corpus).held_out(0)):
        assert not batch.loss_mask_BS[:, -1].any()
        assert batch.loss_mask_BS[:, :-1].all()
        assert batch.loss_tokens == SIZE * (LENGTH - 1)


def test_rows_of_a_batch_are_its_tokens_and_its_mask(corpus: Path) -> None:
    batch = opened(corpus).train(5)
    part = batch.rows(1, 3)
    assert np.array_equal(part.tokens_BS, batch.tokens_BS[1:3])
    assert (part.number, part.loss_mask_BS.shape, part.loss_tokens) == (5, (2, LENGTH), 2 * (LENGTH - 1))


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
