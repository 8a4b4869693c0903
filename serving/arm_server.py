"""The deployment behind one arm: one model in one process, answering a bounded number of requests at a time."""

import asyncio
import gc
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.devices import see_no_gpu
from cluster.registry import on_this_node
from serving.asking import Ask, Item, Piece
from serving.engines import open_engine
from serving.engines.base import Accepted, Refused, Sampling, budget
from serving.link.listener import Listener
from serving.link.post import Post, listening_host
from serving.records import Scored

# Characters of a prompt from which on it is tokenised aside, so that the other requests' tokens go on meanwhile.
_LONG_PROMPT = 20_000
# Pieces that gather of an answer that nobody reads along; more would be one large message.
_MOST_PIECES = 256


class ArmServer:
    """Runs one arm's engine for the doors.

    A door reaches :meth:`answer` through a :class:`serving.link.listener.Listener`, not through Serve. When it closes
    the connection, the generation ends within a token.
    """

    def __init__(
        self,
        engine: str,
        model_dir: Path | None,
        dtype: str,
        threads: int,
        slots: int,
        prompt_limit: int | None = None,
        answer_limit: int | None = None,
        post: Post | None = None,
        gpu: bool = True,
    ) -> None:
        """Load and warm up; no request comes before this returns.

        Args:
            prompt_limit, answer_limit: in tokens; None leaves it to the model's context.
            post: where it is to be reached; None for one that is called by its methods only.
            gpu: whether it may use a GPU, where there is one.
        """
        if not gpu:
            see_no_gpu()
        self._engine = open_engine(engine, model_dir and on_this_node(model_dir), dtype, threads, slots)
        self._prompt_limit, self._answer_limit = prompt_limit, answer_limit
        self._suspect = False
        self._post = post
        self._listener: Listener | None = None
        self._address = ""
        self._announcing: asyncio.Task[None] | None = None

    async def reconfigure(self, _config: Any) -> None:
        """Serve calls this once the arm is made, and waits for it: begin to listen, and let the control know where."""
        if self._post is None or self._listener is not None:
            return
        # The model and its libraries stay; a look at all of their objects would hold up every token for tens of ms.
        gc.collect()
        gc.freeze()
        self._listener = Listener(self._post.secret, self.answer, self._post.room)
        self._address = await self._listener.open(listening_host())
        self._announcing = asyncio.create_task(self._post.announce(self._address))

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve's autoscaling goes by, see :class:`serving.launch.ByLoad`."""
        return {"under_way": float(await self.under_way())}

    def __del__(self) -> Coroutine[Any, Any, None] | None:
        """Serve calls this when it ends a replica, and awaits what it returns: what is under way may end."""
        return None if getattr(self, "_listener", None) is None else self._leave()

    async def _leave(self) -> None:
        assert self._listener is not None and self._post is not None
        if self._announcing is not None:
            self._announcing.cancel()
        await self._post.leave(self._address)
        await self._listener.close(self._post.timeout_s)

    async def answer(self, ask: Ask) -> AsyncGenerator[list[Item], None]:
        """Answer one request. What is there at the same time comes in one list: each message costs its share."""
        try:
            prompt_ids = await self._encode(ask)
            sampling = self._within_limits(ask, len(prompt_ids))
        except Refused as refused:
            # Yielded, not raised: Serve logs a traceback for what is raised, and this is the caller's mistake.
            yield [refused]
            return
        items: list[Item] = [Accepted(len(prompt_ids))]
        ids: list[int] = []
        first = True
        async with aclosing(self._generate(prompt_ids, sampling, ask.choices)) as batches:
            async for pieces in batches:
                if ask.sampled:
                    ids += [token.token_id for index, delta in pieces if index == 0 for token in delta.logprobs]
                    if ask.sampling.logprobs is None:
                        pieces = [Piece(index, replace(delta, logprobs=())) for index, delta in pieces]
                items += pieces
                # The first piece goes at once in any case: the door takes the time to it.
                if ask.streamed or first or len(items) >= _MOST_PIECES:
                    yield items
                    items, first = [], False
        if ask.sampled:
            items.append(Scored(tuple(prompt_ids), tuple(ids)))
        if items:
            yield items

    async def score(self, token_ids: Sequence[int], ids_TK: np.ndarray) -> np.ndarray:
        """Log-probabilities that the arm's model gives to these ids; see :meth:`serving.engines.base.Engine.score`."""
        return await asyncio.to_thread(self._engine.score, token_ids, ids_TK)

    async def under_way(self) -> int:
        """Requests that are running or wait in the engine."""
        load = self._engine.load
        return load.running + load.waiting

    async def check_health(self) -> None:
        """Serve asks this now and then and replaces an arm that raises.

        An error while generating may be the request's fault or a broken device's, so after one the engine has to
        show that it still works; without one, health costs nothing.
        """
        if self._suspect:
            await self.probe()
            self._suspect = False

    async def probe(self) -> None:
        """Generate one token; raises what the engine raises."""
        async for _ in self._engine.generate(self._engine.encode("health"), Sampling(max_tokens=1, temperature=0)):
            pass

    async def _encode(self, ask: Ask) -> list[int]:
        if ask.prompt is None:
            size = sum(len(message["content"]) for message in ask.messages)
            return await self._aside(size, lambda: self._engine.encode_chat(ask.messages))
        if isinstance(ask.prompt, str):
            text = ask.prompt
            return await self._aside(len(text), lambda: self._engine.encode(text))
        self._engine.check_tokens(ask.prompt)
        return list(ask.prompt)

    @staticmethod
    async def _aside(size: int, encode: Callable[[], list[int]]) -> list[int]:
        return await asyncio.to_thread(encode) if size > _LONG_PROMPT else encode()

    def _within_limits(self, ask: Ask, prompt_tokens: int) -> Sampling:
        """The request's sampling with its ``max_tokens`` set."""
        if self._prompt_limit is not None and prompt_tokens > self._prompt_limit:
            raise Refused(
                f"The {ask.param} has {prompt_tokens} tokens; this server takes {self._prompt_limit} at most.",
                param=ask.param,
                code="prompt_too_long",
            )
        wanted, limit = ask.sampling.max_tokens, self._answer_limit
        if limit is not None and wanted is not None and wanted > limit:
            raise Refused(
                f"max_tokens is {wanted}; this server gives {limit} at most.", param="max_tokens", code="max_tokens"
            )
        room = budget(prompt_tokens, wanted, self._engine.context, ask.param)
        most = room if wanted is not None or limit is None else min(room, limit)
        logprobs = 0 if ask.sampled and ask.sampling.logprobs is None else ask.sampling.logprobs
        return replace(ask.sampling, max_tokens=most, logprobs=logprobs)

    async def _generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, choices: int
    ) -> AsyncGenerator[list[Piece], None]:
        if choices > 1:
            async with aclosing(self._generate_several(prompt_ids, sampling, choices)) as batches:
                async for pieces in batches:
                    yield pieces
            return
        try:
            async with aclosing(self._engine.generate(prompt_ids, sampling)) as deltas:
                async for delta in deltas:
                    yield [Piece(0, delta)]
        except Exception:
            self._suspect = True
            raise

    async def _generate_several(
        self, prompt_ids: Sequence[int], sampling: Sampling, choices: int
    ) -> AsyncGenerator[list[Piece], None]:
        queue: asyncio.Queue[Piece | Exception] = asyncio.Queue()

        async def run(index: int) -> None:
            seed = None if sampling.seed is None else (sampling.seed + index + 2**63) % 2**64 - 2**63
            try:
                # Closed in this task when it is cancelled: that frees the place in the batch.
                async with aclosing(self._engine.generate(prompt_ids, replace(sampling, seed=seed))) as deltas:
                    async for delta in deltas:
                        queue.put_nowait(Piece(index, delta))
            except Exception as error:
                queue.put_nowait(error)

        runs = [asyncio.create_task(run(index)) for index in range(choices)]
        left = choices
        try:
            while left:
                pieces = [self._sound(await queue.get())]
                while not queue.empty():
                    pieces.append(self._sound(queue.get_nowait()))
                left -= sum(delta.finish_reason is not None for _, delta in pieces)
                yield pieces
        finally:
            for each in runs:
                each.cancel()
            await asyncio.gather(*runs, return_exceptions=True)

    def _sound(self, item: Piece | Exception) -> Piece:
        if isinstance(item, Exception):
            self._suspect = True
            raise item
        return item
