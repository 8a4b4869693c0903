"""Events come out the same however the network cuts them."""

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.bench.sse import sse

STREAM = (
    ": a comment\n\n"
    'data: {"a": "é\u2028\U0001f600"}\n\n'
    "data:without a space\r\n\r\n"
    "event: named\rid: 7\rdata: first\rdata: second\r\r"
    "\n\n"
    "data: [DONE]\n\n"
).encode()
EVENTS = ['{"a": "é\u2028\U0001f600"}', "without a space", "first\nsecond", "[DONE]"]


def events(pieces: list[bytes]) -> list[str]:
    async def read() -> list[str]:
        async def feed() -> AsyncIterator[bytes]:
            for piece in pieces:
                yield piece

        return [data async for _, data in sse(feed())]

    return asyncio.run(read())


def test_byte_by_byte_and_at_once() -> None:
    assert events([STREAM]) == EVENTS
    assert events([STREAM[i : i + 1] for i in range(len(STREAM))]) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_cut_anywhere(cuts: list[int]) -> None:
    bounds = [0, *sorted(cuts), len(STREAM)]
    assert events([STREAM[a:b] for a, b in itertools.pairwise(bounds)]) == EVENTS


def test_an_end_without_an_empty_line() -> None:
    assert events([b"data: 1\n\ndata: [DONE]\n"]) == ["1", "[DONE]"]
    assert events([b"data: 1\n\ndata: half"]) == ["1"]


def test_broken_utf8_is_not_passed_over() -> None:
    with pytest.raises(UnicodeDecodeError):
        events([b"data: \xff\n\n"])
