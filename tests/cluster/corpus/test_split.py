"""No text on both sides of the cut, and as much held out as was asked for."""

from collections import Counter

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from cluster.corpus.split import Split, repeats, split_documents


def documents_of(texts: list[int], lengths: dict[int, int]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """Hashes and lengths of documents that are given by a number per text."""
    hashes_N = np.array([(text * 0x9E3779B97F4A7C15 + 1) % 2**64 for text in texts], dtype=np.uint64)
    return hashes_N, np.array([lengths[text] for text in texts], dtype=np.int64)


def split(texts: list[int], lengths: dict[int, int], wanted: int) -> Split:
    return split_documents(*documents_of(texts, lengths), wanted, lambda _, at: at)


def whole(spans_P3: npt.NDArray[np.int64]) -> set[int]:
    return set(spans_P3[:, 0].tolist())


def tokens(spans_P3: npt.NDArray[np.int64]) -> int:
    return int((spans_P3[:, 2] - spans_P3[:, 1]).sum())


TEXTS = st.lists(st.integers(0, 12), min_size=1, max_size=40)
LENGTHS = st.fixed_dictionaries({text: st.integers(1, 60) for text in range(13)})


@given(TEXTS, LENGTHS, st.floats(0.01, 0.9))
def test_every_token_is_on_one_side_and_equal_texts_are_on_the_same(
    texts: list[int], lengths: dict[int, int], share: float
) -> None:
    total = sum(lengths[text] for text in texts)
    wanted = max(1, round(total * share))
    found = split(texts, lengths, wanted)
    places: Counter[tuple[int, int]] = Counter()
    held: dict[int, set[tuple[int, ...]]] = {text: set() for text in texts}
    for side, spans_P3 in enumerate((found.train_P3, found.held_out_P3)):
        for document, first, stop in spans_P3.tolist():
            assert 0 <= first < stop <= lengths[texts[document]]
            places.update((document, place) for place in range(first, stop))
            held[texts[document]].add((side, first, stop))
    assert set(places.values()) == {1}
    assert len(places) == total
    # All copies of a text are cut at one place, and short texts, but for one of many copies, at none.
    assert all(len(spans) == (2 if any(first for _, first, _ in spans) else 1) for spans in held.values() if spans)
    cut = [text for text, spans in held.items() if any(first for _, first, _ in spans)]
    assert sum(lengths[text] <= wanted for text in cut) <= 1
    assert found.cut == sum(texts.count(text) for text in cut)
    assert wanted <= tokens(found.held_out_P3)
    # Not much more than was asked for: the last text, which is at most as long, or a token per document that is cut.
    assert tokens(found.held_out_P3) < 2 * wanted + len(texts)


def test_which_documents_are_held_out_is_the_texts_own_affair() -> None:
    lengths = dict.fromkeys(range(2000), 10)
    texts = list(range(1000))
    before = {texts[i] for i in whole(split(texts, lengths, 1000).held_out_P3)}
    # Another order, and a tenth more documents on the next night.
    later = list(reversed(range(1100)))
    after = {later[i] for i in whole(split(later, lengths, 1100).held_out_P3)}
    assert len(before) == 100
    assert len(after) == 110
    trained_before = set(texts) - before
    assert len(after & trained_before) <= 12
    assert len(after & before) >= 85


def test_one_document_is_cut_near_its_end() -> None:
    found = split([0], {0: 1000}, 50)
    assert found.train_P3.tolist() == [[0, 0, 950]]
    assert found.held_out_P3.tolist() == [[0, 950, 1000]]
    assert found.cut == 1


def test_what_was_trained_on_of_a_text_that_grows_is_never_held_out_later() -> None:
    cuts = [int(split([0], {0: length}, round(0.05 * length)).held_out_P3[0, 1]) for length in range(100, 1000, 50)]
    assert cuts == sorted(cuts)


def test_a_cut_moves_to_the_boundary_before_it() -> None:
    hashes_N, lengths_N = documents_of([0], {0: 100})
    found = split_documents(hashes_N, lengths_N, 10, lambda document, at: 80 if (document, at) == (0, 90) else -1)
    assert found.held_out_P3.tolist() == [[0, 80, 100]]


def test_long_and_short_documents_are_held_out_in_proportion() -> None:
    lengths = {0: 3000, 1: 1000} | dict.fromkeys(range(2, 402), 10)
    found = split(list(range(402)), lengths, 400)
    held = {document: stop - first for document, first, stop in found.held_out_P3.tolist()}
    assert (held[0], held[1], found.cut) == (150, 50, 2)
    assert sum(held.values()) == 400


def test_a_short_text_of_many_copies_is_cut_only_where_the_others_do_not_do() -> None:
    lengths = dict.fromkeys(range(100), 10)
    assert split([0] * 100 + list(range(1, 100)), lengths, 100).cut == 0
    assert split([0] * 100 + [1, 2], lengths, 100).cut == 100


def test_copies_of_the_only_text_are_cut_at_one_place() -> None:
    found = split([0] * 400, {0: 100}, 2000)
    assert found.cut == 400
    assert set(found.train_P3[:, 2].tolist()) == {95}
    assert set(found.held_out_P3[:, 1].tolist()) == {95}


def test_repeats_are_all_but_the_first_and_a_collision_is_none() -> None:
    documents = [np.array(ids, dtype=np.int32) for ids in ([1, 2], [3], [1, 2], [4], [1, 2], [3])]
    hashes_N = np.array([7, 8, 7, 7, 7, 8], dtype=np.uint64)
    assert repeats(hashes_N, documents).tolist() == [False, False, True, False, True, True]


def test_a_small_share_of_long_documents_is_held_out_in_whole_pieces() -> None:
    hashes_N, lengths_N = np.arange(400, dtype=np.uint64), np.full(400, 2500, dtype=np.int64)
    found = split_documents(hashes_N, lengths_N, 1024, lambda _, at: at, least=512)
    assert (found.held_out_P3[:, 2] - found.held_out_P3[:, 1]).tolist() == [512, 512]
