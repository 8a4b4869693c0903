"""The overlap is that of comparing every n-gram with every other."""

import numpy as np
import numpy.typing as npt
import pytest

from cluster.corpus import overlap as module
from cluster.corpus.overlap import NGRAM, Overlap, overlap

LENGTH = 32


def counted(starts_NS: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    goes_on_NS = ~starts_NS
    goes_on_NS[:, 0] = False
    return goes_on_NS


def slow(train_NS: npt.NDArray[np.int32], held_NS: npt.NDArray[np.int32], goes_on_NS: npt.NDArray[np.bool_]) -> Overlap:
    known_grams = {tuple(row[i : i + NGRAM]) for row in train_NS.tolist() for i in range(len(row) - NGRAM + 1)}
    ngrams = known = seen = 0
    for row, goes_on in zip(held_NS.tolist(), goes_on_NS, strict=True):
        grams = [
            tuple(row[i : i + NGRAM]) for i in range(len(row) - NGRAM + 1) if all(goes_on[i + 1 : i + NGRAM].tolist())
        ]
        hits = sum(gram in known_grams for gram in grams)
        ngrams, known, seen = ngrams + len(grams), known + hits, seen + (bool(grams) and hits >= 0.8 * len(grams))
    return Overlap(ngrams, known, seen)


@pytest.mark.parametrize("chunk", [1, 3 * LENGTH, 1 << 20])
def test_it_counts_what_a_slow_comparison_counts(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    dice = np.random.default_rng(0)
    train_NS = dice.integers(0, 50_000, (40, LENGTH), dtype=np.int32)
    held_NS = dice.integers(0, 50_000, (12, LENGTH), dtype=np.int32)
    held_NS[0] = train_NS[5]
    held_NS[1, :20] = train_NS[6, 3:23]
    held_NS[2, 4:18] = train_NS[7, 4:18]
    held_NS[3, 1:] = train_NS[8, :-1]
    goes_on_NS = counted(dice.random(held_NS.shape) < 0.02)
    expected = slow(train_NS, held_NS, goes_on_NS)
    assert overlap(train_NS, held_NS, goes_on_NS) == expected
    assert 0 < expected.known < expected.ngrams
    assert expected.seen >= 2


def test_unrelated_text_of_a_small_vocabulary_is_not_taken_for_known() -> None:
    dice = np.random.default_rng(1)
    train_NS, held_NS = (
        dice.integers(0, 16, (2000, 64), dtype=np.int32),
        dice.integers(0, 16, (200, 64), dtype=np.int32),
    )
    found = overlap(train_NS, held_NS, counted(np.zeros(held_NS.shape, dtype=np.bool_)))
    assert found == Overlap(200 * (64 - NGRAM + 1), 0, 0)


def test_the_same_sequences_are_seen_whole() -> None:
    held_NS = np.arange(5 * LENGTH, dtype=np.int32).reshape(5, LENGTH)
    found = overlap(held_NS.repeat(3, axis=0), held_NS, counted(np.zeros(held_NS.shape, dtype=np.bool_)))
    assert (found.known, found.seen) == (found.ngrams, 5)


@pytest.mark.parametrize("shape", [(0, LENGTH), (3, 8)])
def test_few_and_short_sequences_have_few_n_grams(shape: tuple[int, int]) -> None:
    held_NS = np.ones(shape, dtype=np.int32)
    found = overlap(held_NS, held_NS, counted(np.zeros(shape, dtype=np.bool_)))
    assert found == Overlap(shape[0], shape[0], shape[0])
