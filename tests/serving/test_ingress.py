"""What the ingress makes of an arm's answer, whatever happens to the arm on the way."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from serving.api import DONE, ApiError, ChatRequest, Reply
from serving.engine import Delta
from serving.ingress import _events, _follow, _whole

REQUEST = {"model": "m", "messages": [{"role": "user", "content": "a"}]}


class Answer:
    """A handle's response: some items, then perhaps an error."""

    def __init__(self, items: list[Any], error: Exception | None = None) -> None:
        self._items, self._error = iter(items), error
        self.cancelled = False

    def __aiter__(self) -> "Answer":
        return self

    async def __anext__(self) -> Any:
        for item in self._items:
            return item
        raise self._error or StopAsyncIteration

    def cancel(self) -> None:
        self.cancelled = True


def reply() -> Reply:
    return Reply(ChatRequest.model_validate({**REQUEST, "stream": True}), prompt_tokens=3)


def collect(items: AsyncIterator[Any]) -> list[Any]:
    async def all_of_it() -> list[Any]:
        return [item async for item in items]

    return asyncio.run(all_of_it())


DELTAS = [Delta("a", 1), Delta("", 2), Delta("b", 3, "stop")]


def test_a_stream_ends_with_done() -> None:
    *events, done = collect(_events(reply(), _follow("x", Answer(DELTAS))))
    assert done == DONE
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert [choice["delta"].get("content") for choice in choices] == ["", "a", "b", None]
    assert choices[-1]["finish_reason"] == "stop"


def test_a_stream_that_breaks_off_says_so_and_has_no_done() -> None:
    answer = Answer(DELTAS[:1], RayActorError())
    *_, last = collect(_events(reply(), _follow("x", answer)))
    assert json.loads(last.removeprefix("data: "))["error"] == {
        "message": "Arm 'x' failed while answering; its log says why.",
        "type": "server_error",
        "param": None,
        "code": "arm_failed",
    }
    assert not answer.cancelled


def test_a_whole_answer_joins_the_pieces() -> None:
    body = asyncio.run(_whole(reply(), _follow("x", Answer(DELTAS))))
    assert body["choices"][0]["message"]["content"] == "ab"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}


def test_a_full_queue_is_a_503() -> None:
    with pytest.raises(ApiError, match="full queue") as caught:
        collect(_follow("x", Answer([], BackPressureError(num_queued_requests=1, max_queued_requests=1))))
    assert (caught.value.status, caught.value.headers) == (503, {"Retry-After": "1"})


@pytest.mark.parametrize(("read", "cancelled"), [(1, True), (4, False)])
def test_only_an_unread_answer_is_cancelled(read: int, cancelled: bool) -> None:
    answer = Answer(DELTAS)

    async def read_some() -> None:
        items = _follow("x", answer)
        for _ in range(read):
            await anext(items, None)
        await items.aclose()  # type: ignore[attr-defined]

    asyncio.run(read_some())
    assert answer.cancelled is cancelled
