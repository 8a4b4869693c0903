"""One request from its ticket to its last byte: an arm is drawn, asked, and its answer passed on as it comes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from cluster import tracing
from cluster.errors import first_line
from serving.api.errors import ApiError, try_again
from serving.api.replies import DONE, Choice, Reply, sse
from serving.api.requests import ChatRequest, CompletionRequest, Request
from serving.asking import Ask, Item, Piece
from serving.engines.base import Accepted, Refused
from serving.ingress.arms import ArmLostError, Arms
from serving.ingress.http import Send, send_error, send_json, start
from serving.records import Record, Scored

ARM_HEADER = "x-stillhouse-arm"
logger = logging.getLogger("ray.serve")


def ask_of(request: Request, sampled: bool = False) -> Ask:
    """A request as an arm gets it."""
    return Ask(
        request.sampling(),
        prompt=request.prompt if isinstance(request, CompletionRequest) else None,
        messages=[message.for_template() for message in request.messages] if isinstance(request, ChatRequest) else (),
        choices=request.choices,
        streamed=bool(request.stream),
        sampled=sampled,
        trace=tracing.carried(),
    )


@dataclass
class Ticket:
    """What is known of a request before an arm is asked, and what is learnt on the way.

    Attributes:
        arm: the one it was sent to by name; None draws one.
        unit: what the draw goes by.
        begun: when the door had its head, by ``time.perf_counter``.
    """

    request: Request
    arm: str | None
    unit: str
    key: str
    sampled: bool
    begun: float
    at: float = field(default_factory=time.time)
    prompt_tokens: int = 0
    first_token_ms: float | None = None
    scored: Scored | None = None
    choices: list[Choice] = field(default_factory=list)
    started: bool = False
    experiment: str = ""

    def ms(self) -> float:
        """Since the request came."""
        return (time.perf_counter() - self.begun) * 1000

    def begin(self) -> None:
        """Forget what an arm said that is lost."""
        self.prompt_tokens, self.first_token_ms, self.scored = 0, None, None
        self.choices = [Choice() for _ in range(self.request.choices)]

    def take(self, items: list[Item]) -> list[Piece]:
        """Note what came; the pieces of text among it.

        Raises:
            ApiError: the arm refuses the request.
        """
        pieces = []
        for item in items:
            if isinstance(item, Refused):
                raise ApiError(400, item.message, param=item.param, code=item.code)
            if isinstance(item, Accepted):
                self.prompt_tokens = item.prompt_tokens
            elif isinstance(item, Scored):
                self.scored = item
            else:
                if self.first_token_ms is None and (item.delta.text or item.delta.finish_reason):
                    self.first_token_ms = self.ms()
                self.choices[item.choice].add(item.delta)
                pieces.append(item)
        return pieces

    @property
    def completion_tokens(self) -> int:
        """Of all answers so far."""
        return sum(choice.completion_tokens for choice in self.choices)

    def record(self, arm: str, status: int, code: str | None = None, gone: bool = False) -> Record:
        """What the control is told of one arm's part in it."""
        whole = code is None and not gone
        return Record(
            arm=arm,
            at=self.at,
            status=status,
            split=self.arm is None,
            key=self.key,
            code=code,
            gone=gone,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            first_token_ms=self.first_token_ms,
            latency_ms=self.ms() if whole else None,
            experiment=self.experiment,
            sampled=self.scored if whole else None,
        )


class Relay:
    """Passes answers on.

    Args:
        note: is told of every request an arm had a part in.
        again: of an arm, whether it has another process that may answer where one has died.
    """

    def __init__(
        self, arms: Arms, timeout_s: float, note: Callable[[Record], None], again: Callable[[str], bool]
    ) -> None:
        self._arms, self._timeout_s, self._note, self._again = arms, timeout_s, note, again

    async def answer(self, ticket: Ticket, send: Send) -> None:
        """Answer a request, whatever happens to the arm that was drawn first.

        An arm that dies before anything was sent costs the caller time and no more: the next one is asked. One that
        dies in the middle of a stream ends it with an error event and without ``[DONE]``.
        """
        tried: list[str] = []
        while True:
            arm = self._next(ticket, tried)
            ticket.begin()
            try:
                async with asyncio.timeout(self._timeout_s - ticket.ms() / 1000):
                    await self._from(arm, ticket, send)
                self._note(ticket.record(arm, 200))
                return
            except ArmLostError as error:
                logger.warning("arm %s is lost: %s", arm, first_line(error))
                self._note(ticket.record(arm, 503, "arm_unavailable"))
                if not ticket.started:
                    tried.append(arm)
                    if not self._again(arm) or tried.count(arm) > 1:
                        self._arms.shun(arm)
                    continue
                trouble = ApiError(500, f"Arm {arm!r} died while answering.", code="arm_failed")
            except TimeoutError:
                trouble = try_again(504, f"Arm {arm!r} had no whole answer in {self._timeout_s:g} s.", "timeout")
                self._note(ticket.record(arm, 504, "timeout"))
            except ApiError as error:
                trouble = error
                self._note(ticket.record(arm, error.status, error.code or "refused"))
            except asyncio.CancelledError:
                self._note(ticket.record(arm, 499, gone=True))
                raise
            await self._fail(ticket, arm, trouble, send)
            return

    def _next(self, ticket: Ticket, tried: list[str]) -> str:
        """The arm to ask.

        Raises:
            ApiError: none is left.
        """
        if ticket.arm is None:
            spent = [arm for arm in tried if not self._again(arm) or tried.count(arm) > 1]
            if (drawn := self._arms.draw(ticket.unit, spent)) is not None:
                return drawn
            raise try_again(503, "No arm can answer now; try again.", "arm_unavailable")
        if self._arms.is_out(ticket.arm) or (tried and (len(tried) > 1 or not self._again(ticket.arm))):
            raise try_again(
                503,
                f"Arm {ticket.arm!r} cannot answer now; try again, or leave the choice of the arm to the split.",
                "arm_unavailable",
                5.0,
            )
        return ticket.arm

    async def _from(self, arm: str, ticket: Ticket, send: Send) -> None:
        async with aclosing(self._arms.answer(arm, ask_of(ticket.request, ticket.sampled))) as answer:
            first = ticket.take(await anext(answer))
            reply = Reply(ticket.request, ticket.prompt_tokens)
            if ticket.request.stream:
                await self._stream(arm, ticket, reply, first, answer, send)
            else:
                async for items in answer:
                    ticket.take(items)
                ticket.started = True
                await send_json(send, 200, reply.whole(ticket.choices), {ARM_HEADER: arm})

    async def _stream(
        self,
        arm: str,
        ticket: Ticket,
        reply: Reply,
        pieces: list[Piece],
        answer: AsyncGenerator[list[Item], None],
        send: Send,
    ) -> None:
        ticket.started = True
        await start(send, 200, "text/event-stream", {ARM_HEADER: arm, "cache-control": "no-cache"})
        openings = [reply.opening(index) for index in range(len(ticket.choices))]
        held = "".join(sse(opening) for opening in openings if opening)
        while True:
            held += "".join(_events(reply, pieces))
            if held:
                await send({"type": "http.response.body", "body": held.encode(), "more_body": True})
            held = ""
            items = await anext(answer, None)
            if items is None:
                break
            pieces = ticket.take(items)
        counts = reply.counts(ticket.completion_tokens)
        await send({"type": "http.response.body", "body": ((sse(counts) if counts else "") + DONE).encode()})

    async def _fail(self, ticket: Ticket, arm: str, trouble: ApiError, send: Send) -> None:
        if ticket.started:
            await send({"type": "http.response.body", "body": sse(trouble.body()).encode()})
        else:
            trouble.headers[ARM_HEADER] = arm
            await send_error(send, trouble)


def _events(reply: Reply, pieces: list[Piece]) -> list[str]:
    events = []
    for index, delta in pieces:
        if delta.logprobs:
            events.append(sse(reply.piece(index, delta)))
        elif delta.text:
            events.append(reply.text_event(index, delta.text))
        if delta.finish_reason:
            events.append(sse(reply.closing(index, delta.finish_reason)))
    return events
