"""Tokens to text, text to stop strings: nothing is lost, doubled or given out too early."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.text import Detokenizer, StopScanner


def bytes_decode(ids: list[int]) -> str:
    """A byte-level vocabulary: every token is one byte."""
    return bytes(ids).decode(errors="replace")


WORDS = ["", "▁the", "▁sky", "blue", "▁", "!", "▁is"]


def words_decode(ids: list[int]) -> str:
    """SentencePiece's rule: a leading space belongs to the word, but not at the start of a text."""
    return "".join(WORDS[i] for i in ids).replace("▁", " ").removeprefix(" ")


def feed(tokens: list[int], detokenizer: Detokenizer) -> list[str]:
    return [*(detokenizer.feed(token) for token in tokens), detokenizer.flush()]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")))
def test_characters_come_out_whole(text: str) -> None:
    pieces = feed(list(text.encode()), Detokenizer(bytes_decode))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_is_given_out_as_soon_as_it_is_certain() -> None:
    assert feed(list("aé€😀b".encode()), Detokenizer(bytes_decode)) == [
        *("a", "", "é", "", "", "€", "", "", "", "😀", "b", "")
    ]


@given(st.binary(max_size=40))
def test_bytes_that_are_no_text_decode_as_they_do_at_once(data: bytes) -> None:
    assert "".join(feed(list(data), Detokenizer(bytes_decode))) == data.decode(errors="replace")


def test_garbage_does_not_hold_the_text_back() -> None:
    """A poor student may write bytes that never become characters; its reader still sees them come."""
    detokenizer = Detokenizer(bytes_decode)
    assert len("".join(detokenizer.feed(0xFF) for _ in range(50))) >= 47


def test_a_character_left_open_at_the_end_is_shown_as_such() -> None:
    assert feed(list("a€".encode()[:-1]), Detokenizer(bytes_decode)) == ["a", "", "", "\ufffd"]


@given(st.lists(st.integers(1, len(WORDS) - 1), min_size=1), st.data())
def test_spaces_between_words_survive(ids: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(ids)))
    context, fed = ids[:cut], ids[cut:]
    expected = words_decode(ids)[len(words_decode(context)) :]
    assert "".join(feed(fed, Detokenizer(words_decode, context))) == expected


def test_a_token_without_text_changes_nothing() -> None:
    """Special tokens decode to nothing; the next word must keep its space."""
    assert "".join(feed([1, 0, 2, 0, 0, 3], Detokenizer(words_decode, [5]))) == " the skyblue"


def test_the_window_does_not_grow() -> None:
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return bytes_decode(ids)

    feed(list(("word " * 200).encode()), Detokenizer(decode))
    assert longest <= 4


def scan(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    scanner = StopScanner(stops)
    out = []
    for piece in pieces:
        text, stopped = scanner.feed(piece)
        out.append(text)
        if stopped:
            return out, True
    return [*out, scanner.flush()], False


@pytest.mark.parametrize(
    ("stops", "pieces", "out", "stopped"),
    [
        ([], ["ab", "c"], ["ab", "c", ""], False),
        (["END"], ["one E", "N", "D two"], ["one ", "", ""], True),
        (["END"], ["one E", "N", "E two"], ["one ", "", "ENE two", ""], False),
        (["END"], ["EN", "EN", "D"], ["", "EN", ""], True),
        (["aab"], ["aa", "a", "b"], ["", "a", ""], True),
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb", ""], True),
        (["longer stop", "op"], ["a longer st", "op"], ["a ", ""], True),
        (["b", "ab"], ["xab"], ["x"], True),
        (["END"], ["the EN"], ["the ", "EN"], False),
    ],
)
def test_stop_strings_across_pieces(stops: list[str], pieces: list[str], out: list[str], stopped: bool) -> None:
    assert scan(stops, pieces) == (out, stopped)


def test_every_way_to_cut_the_text_gives_the_same_answer() -> None:
    text, stops = "abaabaaab-ab", ["aaab", "b-"]
    expected = "abaab"
    for cuts in itertools.product([False, True], repeat=len(text) - 1):
        pieces = [""]
        for character, cut in zip(text, (*cuts, False), strict=True):
            pieces[-1] += character
            if cut:
                pieces.append("")
        out, stopped = scan(stops, pieces)
        assert ("".join(out), stopped) == (expected, True)
