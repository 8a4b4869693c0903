"""The deployment behind one arm: one model in one process, answering a bounded number of requests at a time."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from serving.engine import Accepted, Delta, Engine, Refused, Sampling, budget

# What both methods yield: Accepted and then Deltas, or Refused and nothing more.
Answer = AsyncIterator[Accepted | Refused | Delta]


class ArmServer:
    """Runs one arm's engine for the ingress.

    Called by ``handle.options(stream=True)``. When the caller cancels, the generation ends within a token.
    """

    def __init__(self, model_dir: Path, dtype: str, threads: int) -> None:
        # Here, and not above: the processes that only talk to an arm shall not load torch.
        from serving.transformers_engine import TransformersEngine

        self._engine: Engine = TransformersEngine(model_dir, dtype, threads)
        self._suspect = False

    async def complete(self, prompt: str | Sequence[int], sampling: Sampling) -> Answer:
        """Continue a text, or token ids that are taken as they are."""
        async for item in self._answer(lambda: self._prompt(prompt), sampling, param="prompt"):
            yield item

    async def chat(self, messages: Sequence[Mapping[str, str]], sampling: Sampling) -> Answer:
        """Answer a chat; each message has ``role`` and ``content``."""
        async for item in self._answer(lambda: self._engine.encode_chat(messages), sampling, param="messages"):
            yield item

    def check_health(self) -> None:
        """Serve asks this now and then and replaces an arm that raises.

        An error while generating may be the request's fault or a broken device's, so after one the engine has to
        show that it still works; without one, health costs nothing.
        """
        if self._suspect:
            prompt = self._engine.encode("health")
            for _ in self._engine.generate(prompt, Sampling(max_tokens=1, temperature=0), threading.Event()):
                pass
            self._suspect = False

    async def _answer(self, encode: Callable[[], list[int]], sampling: Sampling, param: str) -> Answer:
        try:
            prompt_ids = encode()
            limit = budget(len(prompt_ids), sampling.max_tokens, self._engine.context, param)
        except Refused as refused:
            # Yielded, not raised: Serve logs a traceback for what is raised, and this is the caller's mistake.
            yield refused
            return
        yield Accepted(len(prompt_ids))
        async for delta in self._generate(prompt_ids, replace(sampling, max_tokens=limit)):
            yield delta

    async def _generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> AsyncIterator[Delta]:
        loop = asyncio.get_running_loop()
        deltas: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()
        gone = threading.Event()

        def pump() -> None:
            end: Exception | None = None
            try:
                for delta in self._engine.generate(prompt_ids, sampling, gone):
                    loop.call_soon_threadsafe(deltas.put_nowait, delta)
            except Exception as error:
                end = error
            loop.call_soon_threadsafe(deltas.put_nowait, end)

        # A daemon: a generation must not keep the process alive once Serve has given it up.
        threading.Thread(target=pump, daemon=True).start()
        try:
            while (item := await deltas.get()) is not None:
                if isinstance(item, Exception):
                    self._suspect = True
                    raise item
                yield item
        finally:
            gone.set()

    def _prompt(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            return self._engine.encode(prompt)
        self._engine.check_tokens(prompt)
        return list(prompt)
