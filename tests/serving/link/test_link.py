"""Doors and arms over real sockets: whole answers, streams, and every way in which either side may leave."""

import asyncio
import struct
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.api.replies import Choice
from serving.asking import Ask, Item, Piece
from serving.engines.base import Accepted, Alternative, Delta, Refused, Sampling, TokenLogprob
from serving.link.frames import MOST_TOKENS, Frames, WireError, ask_in, ask_out, items_in, items_out, packed, shares
from serving.link.listener import Listener
from serving.link.pool import BusyError, FailedError, LostError, Pool
from serving.records import Scored

SECRET = "s" * 64
LOGPROB = TokenLogprob(5, "bytes:\\xe2", b"\xe2\x82", -0.5, (Alternative(6, "b", b"b", -1.5),), 3)
# A megabyte and a quarter where a frame has its fill of it.
LARGE = TokenLogprob(5, "b", b"b", -0.5, (Alternative(6, "b" * 250, b"b", -1.5),) * 20, 3)
ITEMS: list[Item] = [
    Accepted(3),
    Piece(1, Delta("a\u20ac", 2, None, (LOGPROB,))),
    Piece(0, Delta("", 3, "stop")),
    Scored((1, 2), (3,)),
]
ASK = Ask(Sampling(5, 0.5, 0.9, ("a", "b"), -7, 3), messages=({"role": "user", "content": "hi"},), choices=2)


def test_what_is_said_arrives_as_it_was() -> None:
    (frame,) = Frames().feed(packed(items_out(ITEMS)))
    assert items_in(frame) == ITEMS
    (refused,) = items_in(Frames().feed(packed(items_out([Refused("no", "prompt", "code")])))[0])
    assert isinstance(refused, Refused) and refused.args == ("no", "prompt", "code")
    for ask in (ASK, Ask(Sampling(), prompt=[1, 2]), Ask(Sampling(), prompt="text", streamed=False, sampled=True)):
        assert ask_in(Frames().feed(packed(ask_out(ask)))[0]) == ask


@given(st.lists(st.text(max_size=50), max_size=5), st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_frames_are_whole_however_the_bytes_come(texts: list[str], cuts: list[int]) -> None:
    sent, frames, found, at = b"".join(packed(text) for text in texts), Frames(), [], 0
    turn = 0
    while at < len(sent):
        step = cuts[turn % len(cuts)]
        found += frames.feed(sent[at : at + step])
        at, turn = at + step, turn + 1
    assert found == texts


@pytest.mark.parametrize("sent", [struct.pack(">I", 2**31), struct.pack(">I", 1) + b"\xc1", struct.pack(">I", 0)])
def test_what_is_no_frame_is_refused(sent: bytes) -> None:
    with pytest.raises(WireError):
        Frames(1000).feed(sent)


def heard(items: list[Item]) -> list[Choice]:
    """The two choices, as a door puts them together."""
    choices = [Choice(), Choice()]
    for item in items:
        if isinstance(item, Piece):
            choices[item.choice].add(item.delta)
    for choice in choices:
        choice.text = ["".join(choice.text)]
    return choices


@pytest.mark.parametrize("sizes", [[1] * 1000, [0, 255, 1, 1], [700], [3, 512, 0, 257], [0], []])
def test_log_probabilities_go_in_frames_that_stay_small(sizes: list[int]) -> None:
    items: list[Item] = [Accepted(1)]
    items += [Piece(at % 2, Delta(f"<{at}>", at + 1, None, (LOGPROB,) * size)) for at, size in enumerate(sizes)]
    items.append(Piece(0, Delta("end", len(sizes) + 1, "stop")))
    found = list(shares(items))
    told = [[len(item.delta.logprobs) for item in share if isinstance(item, Piece)] for share in found]
    assert all(0 <= sum(share) <= MOST_TOKENS for share in told) and all(found)
    assert sum(map(sum, told)) == sum(sizes)
    sent, come = heard(items), heard([item for share in found for item in share])
    assert come == sent and come[0].finish_reason == "stop"


class Arm:
    """A listener that says what it is asked to, for the time of a test."""

    def __init__(self, most: int = 10) -> None:
        self.listener = Listener(SECRET, self.answer, most)
        self.ended: list[str] = []

    async def answer(self, ask: Ask) -> AsyncGenerator[list[Item], None]:
        wish = str(ask.prompt)
        try:
            yield [Accepted(1)]
            if wish == "fail":
                raise RuntimeError("device lost")
            if wish == "wait":
                await asyncio.Event().wait()
            if wish == "large":
                yield [Piece(0, Delta("x", 1, None, (LARGE,) * MOST_TOKENS)) for _ in range(20)]
                yield [Piece(0, Delta("x", 1, None, (LARGE,) * MOST_TOKENS * 20))]
            for at in range(int(wish) if wish.isdigit() else 1):
                yield [Piece(0, Delta("x" * 1000, at + 1))]
            yield [Piece(0, Delta("", 1, "stop"))]
        finally:
            self.ended.append(wish)


def on_stage(play: Callable[[Arm, str, Pool], Awaitable[None]], most: int = 10, secret: str = SECRET) -> None:
    async def go() -> None:
        arm = Arm(most)
        address = await arm.listener.open("127.0.0.1")
        pool = Pool(secret)
        async with asyncio.timeout(20):
            await play(arm, address, pool)
        pool.close()
        await arm.listener.close(1)

    asyncio.run(go())


def ask(wish: str) -> Ask:
    return Ask(Sampling(), prompt=wish)


async def whole(pool: Pool, address: str, wish: str) -> list[Item]:
    return [item async for items in pool.answer(address, ask(wish)) for item in items]


def test_a_connection_serves_one_request_after_the_other() -> None:
    async def play(arm: Arm, address: str, pool: Pool) -> None:
        for _ in range(5):
            assert len(await whole(pool, address, "3")) == 5
        assert len(pool._idle[address]) == 1 and pool.under_way(address) == 0
        await asyncio.gather(*(whole(pool, address, "3") for _ in range(5)))
        assert len(pool._idle[address]) == 5

    on_stage(play)


def test_an_answer_larger_than_a_frame_may_be_comes_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.link.pool.Frames", lambda: Frames(2 * 2**20))

    async def play(arm: Arm, address: str, pool: Pool) -> None:
        items = await whole(pool, address, "large")
        assert sum(len(item.delta.logprobs) for item in items if isinstance(item, Piece)) == 40 * MOST_TOKENS
        assert len(pool._idle[address]) == 1

    on_stage(play)


def test_who_leaves_ends_the_generation_and_frees_the_place() -> None:
    async def play(arm: Arm, address: str, pool: Pool) -> None:
        async with aclosing(pool.answer(address, ask("wait"))) as answer:
            assert await anext(answer) == [Accepted(1)]
            assert (arm.listener.under_way, pool.under_way(address)) == (1, 1)
        while arm.listener.under_way:
            await asyncio.sleep(0.01)
        assert arm.ended == ["wait"] and pool.under_way(address) == 0 and not pool._idle[address]

    on_stage(play)


def test_a_reader_that_does_not_read_holds_the_arm_back() -> None:
    """Not all of a long answer is made, and kept in memory, for a client that stands still."""

    async def play(arm: Arm, address: str, pool: Pool) -> None:
        wire = await pool._wire(address)
        wire._transport.pause_reading()
        wire.send(ask_out(ask("1000000")))
        await asyncio.sleep(0.5)
        assert arm.listener.under_way == 1 and not arm.ended
        wire.abort()
        while not arm.ended:
            await asyncio.sleep(0.01)

    on_stage(play)


def test_a_full_queue_a_failure_and_a_death_are_told_apart() -> None:
    async def play(arm: Arm, address: str, pool: Pool) -> None:
        with pytest.raises(FailedError):
            await whole(pool, address, "fail")
        async with aclosing(pool.answer(address, ask("wait"))) as answer:
            await anext(answer)
            with pytest.raises(BusyError):
                await whole(pool, address, "1")
        while arm.listener.under_way:
            await asyncio.sleep(0.01)
        assert await whole(pool, address, "1")  # the place is free again
        waiting = asyncio.create_task(whole(pool, address, "wait"))
        await asyncio.sleep(0.1)
        pool.forget(address)
        with pytest.raises(LostError) as lost:
            await waiting
        assert lost.value.begun

    on_stage(play, most=1)


def test_where_nobody_listens_nothing_has_begun() -> None:
    async def play(arm: Arm, address: str, pool: Pool) -> None:
        await arm.listener.close(0)
        with pytest.raises(LostError) as lost:
            await whole(pool, address, "1")
        assert not lost.value.begun

    on_stage(play)


def test_a_kept_connection_that_has_died_meanwhile_is_not_used() -> None:
    async def play(arm: Arm, address: str, pool: Pool) -> None:
        await whole(pool, address, "1")
        pool._idle[address][0].abort()
        await asyncio.sleep(0.05)
        assert await whole(pool, address, "1")

    on_stage(play)


def test_who_does_not_know_the_secret_is_not_served() -> None:
    async def play(arm: Arm, address: str, pool: Pool) -> None:
        with pytest.raises(LostError):
            await whole(pool, address, "1")
        assert not arm.ended

    for secret in ("", "wrong", SECRET + "s", "x" * 10_000):
        on_stage(play, secret=secret)


@pytest.mark.parametrize("sent", [b"\xff" * 100, b"\x00" * 100, struct.pack(">I", 2**30), b"GET / HTTP/1.1\r\n\r\n"])
def test_garbage_closes_the_connection_and_nothing_else(sent: bytes) -> None:
    async def play(arm: Arm, address: str, pool: Pool) -> None:
        host, _, port = address.rpartition(":")
        for greeting in (b"", packed(SECRET)):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(greeting + sent)
            assert await reader.read() == b""
            writer.close()
        assert await whole(pool, address, "1")

    on_stage(play)


def test_closing_waits_for_what_is_under_way() -> None:
    async def play(arm: Arm, address: str, pool: Pool) -> None:
        answer: Any = asyncio.create_task(whole(pool, address, "20000"))
        await asyncio.sleep(0)
        while not arm.listener.under_way:
            await asyncio.sleep(0)
        await arm.listener.close(10)
        assert len(await answer) == 20002
        started = time.monotonic()
        await arm.listener.close(5)
        assert time.monotonic() - started < 1

    on_stage(play)


def test_closing_ends_idle_connections_at_once_and_busy_ones_after_their_answer() -> None:
    async def play(arm: Arm, address: str, pool: Pool) -> None:
        assert await whole(pool, address, "1")  # leaves a connection that is kept for the next request
        answer: Any = asyncio.create_task(whole(pool, address, "20000"))
        while not arm.listener.under_way:
            await asyncio.sleep(0)
        await arm.listener.close(10)
        assert len(await answer) == 20002
        await asyncio.sleep(0.1)  # the news that it is closed comes by the connection itself
        with pytest.raises(LostError) as caught:
            await whole(pool, address, "1")
        assert not caught.value.begun

    on_stage(play)
