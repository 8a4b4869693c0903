"""From tokens to deltas: what is held back, where it ends, which log-probabilities go out with which text."""

from collections.abc import Sequence

import pytest

from serving.engines.answer import Answer, Chances
from serving.engines.base import Delta, Sampling
from serving.engines.echo import EchoEngine

END = 256


def write(
    tokens: Sequence[int], *, limit: int = 100, stop: tuple[str, ...] = (), logprobs: bool = False
) -> list[Delta]:
    """Feed tokens, which are bytes, until the answer is over; token t has log-probability -t."""
    answer = Answer(EchoEngine(), (END,), (), Sampling(max_tokens=limit, stop=stop))
    deltas = []
    for token in tokens:
        delta = answer.feed(token, Chances(-float(token), [(token, -float(token)), (END, -1.0)]) if logprobs else None)
        if delta is not None:
            deltas.append(delta)
            if delta.finish_reason is not None:
                return deltas
    raise AssertionError("the answer did not end")


def test_the_limit_ends_it() -> None:
    assert write(b"abc", limit=2) == [Delta("a", 1), Delta("b", 2, "length")]


def test_the_end_token_ends_it_and_is_counted() -> None:
    assert write([*b"ab", END]) == [Delta("a", 1), Delta("b", 2), Delta("", 3, "stop")]


def test_a_stop_string_ends_it_before_itself_also_at_the_limit() -> None:
    assert write(b"abXYc", stop=("XY",)) == [Delta("a", 1), Delta("b", 2), Delta("", 4, "stop")]
    assert write(b"abXY", stop=("XY",), limit=4)[-1] == Delta("", 4, "stop")
    # What only began like one is text after all.
    assert write(b"abX", stop=("XY",), limit=3)[-1] == Delta("X", 3, "length")


def test_half_a_character_waits_for_the_other_half() -> None:
    assert write("é!".encode(), limit=3) == [Delta("é", 2), Delta("!", 3, "length")]
    assert write("é".encode()[:1], limit=1) == [Delta("\ufffd", 1, "length")]


def test_logprobs_go_out_with_their_text_and_say_their_bytes() -> None:
    first, last = write("é!".encode(), limit=3, logprobs=True)
    assert [(one.token, one.raw, one.text_offset) for one in first.logprobs] == [
        ("bytes:\\xc3", b"\xc3", 0),
        ("bytes:\\xa9", b"\xa9", 0),
    ]
    (mark,) = last.logprobs
    assert (mark.token_id, mark.token, mark.raw, mark.logprob, mark.text_offset) == (33, "!", b"!", -33.0, 1)
    assert [(other.token_id, other.token, other.logprob) for other in mark.top] == [(33, "!", -33.0), (END, "", -1.0)]


@pytest.mark.parametrize(
    ("tokens", "options", "told"),
    [
        ([*b"ab", END], {}, "ab"),  # not the end token
        (b"abXYc", {"stop": ("XY",)}, "ab"),  # not the stop string
        (b"abXc", {"stop": ("XY",), "limit": 4}, "abXc"),  # but what only looked like one
        (b"abX", {"stop": ("XY",), "limit": 3}, "abX"),
    ],
)
def test_logprobs_are_told_once_for_each_token_of_the_text(tokens: Sequence[int], options: dict, told: str) -> None:
    deltas = write(tokens, logprobs=True, **options)
    assert "".join(one.token for delta in deltas for one in delta.logprobs) == told
    assert "".join(delta.text for delta in deltas) == told
    at = 0
    for delta in deltas:
        assert all(one.text_offset < at + len(delta.text) for one in delta.logprobs)
        at += len(delta.text)
