"""Readers of an engine's answers for tests that are not coroutines themselves."""

import asyncio
from collections.abc import Callable, Sequence

import pytest

from serving.engines.base import Delta, Engine, Sampling

Ask = Callable[..., list[list[Delta]]]


@pytest.fixture(scope="session")
def ask() -> Ask:
    """``ask(engine, (prompt, sampling), ...)``: the deltas of each of some requests that are made at once."""

    async def one(engine: Engine, prompt: Sequence[int], sampling: Sampling) -> list[Delta]:
        return [delta async for delta in engine.generate(prompt, sampling)]

    async def all_of(engine: Engine, requests: Sequence[tuple[Sequence[int], Sampling]]) -> list[list[Delta]]:
        return list(await asyncio.gather(*(one(engine, *request) for request in requests)))

    return lambda engine, *requests: asyncio.run(all_of(engine, requests))
