"""One request through a door, whatever happens to the arms on the way. The arms are scripts; the rest is real."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from serving.api.errors import ApiError
from serving.api.requests import ChatRequest, CompletionRequest
from serving.asking import Item, Piece
from serving.engines.base import Accepted, Delta, Refused
from serving.ingress.arms import Arms
from serving.ingress.http import send_error
from serving.ingress.relay import ARM_HEADER, Relay, Ticket, ask_of
from serving.link.pool import BusyError, FailedError, LostError
from serving.plan import Plan
from serving.records import Record, Scored

WHOLE = [[Accepted(3), Piece(0, Delta("a", 1))], [Piece(0, Delta("b", 2)), Piece(0, Delta("", 3, "stop"))]]
DIED = LostError("the connection has ended", begun=True)
NOBODY = LostError("no connection", begun=False)


class Script:
    """What a process says to one request: items, then perhaps an error, or silence."""

    def __init__(self, items: list[Any], error: Exception | None = None, silent: bool = False) -> None:
        self.items, self.error, self.silent = list(items), error, silent
        self.cancelled = False
        self.forgotten = asyncio.Event()


class Handle:
    """Plays its scripts one after another, and notes what it was asked."""

    def __init__(self, *scripts: Script) -> None:
        self.scripts, self.asked = list(scripts), []  # type: ignore[var-annotated]

    def remote(self, ask: Any) -> Script:
        self.asked.append(ask)
        return self.scripts[len(self.asked) - 1]


class Scripted:
    """A pool whose processes are such handles; an address is the arm's name and a letter."""

    def __init__(self, handles: dict[str, Handle]) -> None:
        self.handles = handles
        self.playing: list[tuple[str, Script]] = []

    def under_way(self, address: str) -> int:
        return 0

    def forget(self, address: str) -> None:
        for where, script in self.playing:
            if where == address:
                script.forgotten.set()

    async def answer(self, address: str, ask: Any) -> AsyncGenerator[list[Item], None]:
        script = self.handles[address].remote(ask)
        self.playing.append((address, script))
        try:
            for items in script.items:
                await asyncio.sleep(0)
                yield items
            if script.silent:
                await script.forgotten.wait()
                raise DIED
            if script.error:
                raise script.error
        except (GeneratorExit, asyncio.CancelledError):
            script.cancelled = True
            raise


def plan_of(handles: dict[str, Handle], weights: dict[str, float]) -> Plan:
    return Plan(1, weights, {arm: arm for arm in handles}, addresses={arm: (arm,) for arm in handles})


class Scene:
    """A relay over some handles; what it sent and noted."""

    def __init__(
        self, handles: dict[str, Handle], weights: dict[str, float], timeout_s: float = 5.0, again: str = ""
    ) -> None:
        self.lost: list[str] = []
        self.pool = Scripted(handles)
        self.arms = Arms(self.pool, self.lost.append)  # type: ignore[arg-type]
        self.arms.plan = plan_of(handles, weights)
        self.records: list[Record] = []
        self.sent: list[Any] = []
        self.relay = Relay(self.arms, timeout_s, self.records.append, lambda arm: arm == again)

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    def run(self, arm: str | None = None, request: Any = None, sampled: bool = False) -> None:
        async def go() -> None:
            ticket = Ticket(request or chat(), arm, "user:1", "app", sampled, time.perf_counter())
            try:
                await self.relay.answer(ticket, self.send)
            except ApiError as error:  # as the door does it
                await send_error(self.send, error)

        asyncio.run(go())

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent[1:]).decode()

    @property
    def body(self) -> Any:
        return json.loads(self.text)


def chat(**more: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "a"}], **more})


def test_a_whole_answer() -> None:
    scene = Scene({"x": Handle(Script(WHOLE))}, {"x": 1})
    scene.run()
    assert (scene.status, scene.headers[ARM_HEADER]) == (200, "x")
    assert scene.body["choices"][0]["message"]["content"] == "ab"
    assert scene.body["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    (record,) = scene.records
    assert (record.arm, record.status, record.code, record.split, record.key) == ("x", 200, None, True, "app")
    assert (record.prompt_tokens, record.completion_tokens) == (3, 3)
    assert record.first_token_ms is not None and record.latency_ms is not None
    assert 0 < record.first_token_ms <= record.latency_ms


def test_a_stream_ends_with_its_counts_and_done() -> None:
    scene = Scene({"x": Handle(Script(WHOLE))}, {"x": 1})
    scene.run(request=chat(stream=True, stream_options={"include_usage": True}))
    *events, done = [line for line in scene.text.split("\n\n") if line]
    assert done == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert [c["choices"][0]["delta"].get("content") for c in chunks[:-1]] == ["", "a", "b", None]
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert scene.headers["content-type"] == "text/event-stream"


def test_an_arm_that_dies_before_its_first_word_costs_nobody_the_answer() -> None:
    """The other arm answers; both parts are noted; and the dead one is left alone for a while."""
    scene = Scene({"x": Handle(Script([], DIED)), "y": Handle(Script(WHOLE))}, {"x": 1e9, "y": 1e-9})
    scene.run()
    assert (scene.status, scene.headers[ARM_HEADER]) == (200, "y")
    assert [(record.arm, record.code) for record in scene.records] == [("x", "arm_unavailable"), ("y", None)]
    assert scene.arms.is_out("x") and not scene.arms.is_out("y")


def test_an_arm_that_dies_in_the_middle_of_a_whole_answer_too() -> None:
    scene = Scene({"x": Handle(Script(WHOLE[:1], DIED)), "y": Handle(Script(WHOLE))}, {"x": 1e9, "y": 1e-9})
    scene.run()
    assert (scene.status, scene.body["choices"][0]["message"]["content"]) == (200, "ab")  # nothing of x's is in it


def test_one_that_dies_in_a_stream_ends_it_with_an_error_and_without_done() -> None:
    scene = Scene({"x": Handle(Script(WHOLE[:1], DIED)), "y": Handle(Script(WHOLE))}, {"x": 1e9, "y": 1e-9})
    scene.run(request=chat(stream=True))
    assert scene.status == 200
    assert "[DONE]" not in scene.text
    last = json.loads(scene.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "arm_failed"


def test_an_arm_with_another_process_is_asked_once_more() -> None:
    """The dead process is not asked again; where the second one dies too, it is enough."""
    for second, status in ((Script(WHOLE), 200), (Script([], DIED), 503)):
        handles = {"x": Handle(), "x2": Handle(), "x3": Handle()}
        scene = Scene(handles, {"x": 1}, again="x")
        processes = ("x", "x2") if status == 200 else ("x", "x2", "x3")
        scene.arms.plan = Plan(1, {"x": 1}, {"x": "r"}, addresses={"r": processes})
        order = iter([Script([], DIED), second, Script(WHOLE)])
        for handle in handles.values():
            handle.remote = lambda ask, order=order: next(order)  # type: ignore[method-assign,misc]
        scene.run()
        assert scene.status == status
        assert len(set(scene.lost)) == (1 if status == 200 else 2)


def test_where_nobody_takes_the_connection_the_next_process_does() -> None:
    order = iter([Script([], NOBODY), Script(WHOLE)])
    handles = {"x": Handle(), "x2": Handle()}
    scene = Scene(handles, {"x": 1})
    scene.arms.plan = Plan(1, {"x": 1}, {"x": "r"}, addresses={"r": ("x", "x2")})
    for handle in handles.values():
        handle.remote = lambda ask: next(order)  # type: ignore[method-assign]
    scene.run()
    assert scene.status == 200 and len(scene.lost) == 1
    assert [record.code for record in scene.records] == [None]  # the caller's request never failed


@pytest.mark.parametrize("named", [None, "x"])
def test_where_no_arm_is_left_the_caller_is_told_to_try_again(named: str | None) -> None:
    scene = Scene({"x": Handle(Script([], DIED))}, {"x": 1})
    scene.run(arm=named)
    assert (scene.status, scene.body["error"]["code"], scene.headers["retry-after"]) == (
        503,
        "arm_unavailable",
        "1" if named is None else "5",
    )


def test_one_that_was_asked_for_by_name_is_not_replaced_by_another() -> None:
    other = Handle(Script(WHOLE))
    scene = Scene({"x": Handle(Script([], DIED)), "y": other}, {"x": 1, "y": 1})
    scene.run(arm="x")
    assert scene.status == 503 and not other.asked


@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        (Script([[Refused("too long", "messages", "context_length_exceeded")]]), 400, "context_length_exceeded"),
        (Script([], BusyError("x")), 503, "overloaded"),
        (Script([], FailedError("x")), 500, "arm_failed"),
        (Script([[Accepted(1)]], silent=True), 504, "timeout"),
        (Script([], silent=True), 504, "timeout"),
    ],
)
def test_what_is_no_death_is_the_answer(script: Script, status: int, code: str) -> None:
    other = Handle(Script(WHOLE))
    scene = Scene(
        {"x": Handle(script), "y": other}, {"x": 1e9, "y": 1e-9}, timeout_s=0.2 if code == "timeout" else 30.0
    )
    scene.run()
    assert (scene.status, scene.body["error"]["code"], scene.headers[ARM_HEADER]) == (status, code, "x")
    assert not other.asked
    assert [(record.status, record.code) for record in scene.records] == [(status, code)]
    assert script.cancelled == (code == "timeout" or status == 400)


def test_a_client_that_hangs_up_ends_the_generation() -> None:
    script = Script(WHOLE[:1], silent=True)
    scene = Scene({"x": Handle(script)}, {"x": 1})

    async def go() -> None:
        ticket = Ticket(chat(), None, "user:1", "", False, time.perf_counter())
        task = asyncio.create_task(scene.relay.answer(ticket, scene.send))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())
    assert script.cancelled
    (record,) = scene.records
    assert record.gone and record.code is None and record.latency_ms is None and not scene.sent


def test_what_waits_at_a_process_that_is_given_up_goes_to_another() -> None:
    script = Script([], silent=True)
    scene = Scene({"x": Handle(script), "y": Handle(Script(WHOLE))}, {"x": 1e9, "y": 1e-9})

    async def go() -> None:
        ticket = Ticket(chat(), None, "user:1", "", False, time.perf_counter())
        task = asyncio.create_task(scene.relay.answer(ticket, scene.send))
        await asyncio.sleep(0.05)
        scene.arms.follow(scene.arms.plan.next(gone=frozenset(["x"])))
        await asyncio.wait_for(task, 2)

    asyncio.run(go())
    assert (scene.status, scene.headers[ARM_HEADER]) == (200, "y")


def test_a_sampled_answer_brings_its_tokens_to_the_record() -> None:
    scored = Scored((1, 2), (3, 4))
    handle = Handle(Script([*WHOLE, [scored]]))
    scene = Scene({"x": handle}, {"x": 1})
    scene.run(sampled=True)
    assert handle.asked[0].sampled
    assert scene.records[0].sampled == scored


def test_what_an_arm_is_asked() -> None:
    ask = ask_of(chat(messages=[{"role": "developer", "content": "b"}], n=2, stream=True))
    assert (ask.prompt, ask.messages, ask.choices, ask.streamed) == (
        None,
        [{"role": "system", "content": "b"}],
        2,
        True,
    )
    assert ask.param == "messages"
    ask = ask_of(CompletionRequest.model_validate({"model": "m", "prompt": [1, 2], "seed": 5}))
    assert (ask.prompt, ask.sampling.seed, ask.streamed, ask.param) == ([1, 2], 5, False, "prompt")
