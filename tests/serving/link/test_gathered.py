"""Writes that leave together: in order, before a close, and at once where they grow large."""

import asyncio
from typing import Any

from serving.link.gathered import Gathered


class Transport:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def write(self, data: bytes) -> None:
        self.said.append(data)

    def close(self) -> None:
        self.said.append("close")

    def is_closing(self) -> bool:
        return "close" in self.said


def test_what_is_written_in_one_turn_leaves_as_one() -> None:
    async def play() -> None:
        transport: Any = Transport()
        gathered = Gathered(transport)
        gathered.write(b"a")
        gathered.write(b"b")
        assert transport.said == []
        await asyncio.sleep(0)
        assert transport.said == [b"ab"]
        gathered.write(b"c")
        await asyncio.sleep(0)
        assert transport.said == [b"ab", b"c"]

    asyncio.run(play())


def test_closing_sends_first_and_what_is_large_does_not_wait() -> None:
    async def play() -> None:
        transport: Any = Transport()
        gathered = Gathered(transport)
        gathered.write(b"x" * 100_000)
        assert transport.said == [b"x" * 100_000]
        gathered.write(b"last")
        gathered.close()
        assert transport.said[1:] == [b"last", "close"] and gathered.is_closing()
        await asyncio.sleep(0)
        assert transport.said[3:] == []

    asyncio.run(play())
