"""A request that is cancelled just while the model's thread is at it: what was said is not said over."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.engines.base import Load, Sampling
from serving.engines.mailbox import Mailbox
from serving.engines.scheduler import Request, Scheduler
from serving.engines.transformers import TransformersEngine


@pytest.fixture
def engine(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(tiny_model, dtype="float32", slots=1)
    monkeypatch.setattr(engine._model, "ends", frozenset())  # no token ends the text
    yield engine
    asyncio.run(engine.close())


def test_a_cancellation_while_a_token_is_handed_on_ends_the_request(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_on: list[Any] = []
    put = Mailbox.put

    def put_and_cancel(mailbox: Mailbox, item: Any) -> bool:
        handed_on.append(item)
        # The reader's thread has its turn in the middle of this.
        for request in [*engine._scheduler._running]:
            reader = threading.Thread(target=engine._scheduler.cancel, args=(request,))
            reader.start()
            reader.join()
        return put(mailbox, item)

    monkeypatch.setattr(Mailbox, "put", put_and_cancel)

    async def read() -> None:
        answer = engine.generate(engine.encode("hello"), Sampling(max_tokens=200, temperature=0))
        await anext(answer)
        async with asyncio.timeout(30):
            while engine.load != Load(0, 0):
                await asyncio.sleep(0.01)
        await answer.aclose()

    asyncio.run(read())
    assert len(handed_on) <= 2  # the one it may have joined with, and the one it was cancelled at


def test_a_cancellation_while_a_token_is_looked_at_stays() -> None:
    class Cancelling:
        """A delta during whose look the reader has its turn."""

        @property
        def finish_reason(self) -> None:
            request.gone = True

    class Answer:
        def feed(self, token: int, thought: Any) -> Any:
            return Cancelling()

    request = Request([1], Sampling(max_tokens=5), Answer(), lambda item: None)  # type: ignore[arg-type]
    Scheduler._tell(request, 2, None)
    assert request.gone
