"""The engine that every machine has: transformers' models under our own continuous batching, on the CPU or a GPU.

transformers has a batching of its own (``ContinuousBatchingManager``); it has one seed for all requests, no
alternatives' log-probabilities, and one error in a step ends it for good.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path

import numpy as np

from serving.engines.answer import Answer
from serving.engines.base import Delta, Load, Sampling
from serving.engines.mailbox import Mailbox
from serving.engines.model import CausalModel
from serving.engines.scheduler import Request, Scheduler
from serving.engines.tokens import Tokenizer


class TransformersEngine:
    """A causal language model from a local Hugging Face directory, on the GPU if this process sees one.

    A request's greedy text, and its text under a seed, is the same alone and in a batch, as far as the arithmetic
    is: a matrix product of eight rows may round otherwise than one of a single row. In float32 that moves logits by
    about 1e-6 and practically never a token. In bfloat16 it moves them by about 1 %, so where the model finds two
    tokens nearly equally likely, a batch may choose the other one.

    See :class:`serving.engines.base.Engine`.
    """

    def __init__(
        self, model_dir: Path | str, dtype: str = "auto", threads: int = 1, slots: int = 8, kv_tokens: int | None = None
    ) -> None:
        """Load, check that the model can be batched, and warm up.

        Args:
            model_dir: written by ``save_pretrained``, model and tokenizer.
            dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
            threads: torch threads of this process; more than the process has CPUs makes them spin on each other.
            slots: the most requests that share a forward pass; more wait.
            kv_tokens: the most tokens whose keys and values are held at once; None takes a quarter of the free
                memory (of a GPU's: four fifths), but not more than all slots at full context need. A context that
                is longer than this is cut to it.

        Raises:
            UserError: this engine cannot batch this kind of model.
        """
        self._tokenizer = Tokenizer(model_dir)
        self._model = CausalModel(model_dir, dtype, self._tokenizer.end)
        self._tokenizer.vocabulary = self._model.vocabulary
        sample = self._tokenizer.encode("warm-up")
        self._scheduler = Scheduler(self._model, slots, kv_tokens, threads, sample)

    @property
    def context(self) -> int:
        """See :class:`serving.engines.base.Engine`."""
        return self._model.context

    @property
    def load(self) -> Load:
        """See :class:`serving.engines.base.Engine`."""
        return self._scheduler.load

    def encode(self, prompt: str) -> list[int]:
        """See :meth:`serving.engines.base.Engine.encode`."""
        return self._tokenizer.encode(prompt)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """See :meth:`serving.engines.base.Engine.encode_chat`."""
        return self._tokenizer.encode_chat(messages)

    def check_tokens(self, token_ids: Sequence[int]) -> None:
        """See :meth:`serving.engines.base.Engine.check_tokens`."""
        self._tokenizer.check(token_ids)

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        """See :meth:`serving.engines.base.Engine.generate`."""
        mailbox = Mailbox()

        def emit(item: Delta | Exception) -> None:
            # Not `gone |= ...`, which reads it first: a cancellation that comes during `put` would be overwritten.
            if not mailbox.put(item):
                request.gone = True

        request = Request(prompt_ids, sampling, Answer(self._tokenizer, self._model.ends, prompt_ids, sampling), emit)
        self._scheduler.submit(request)
        try:
            async for delta in mailbox.read():
                yield delta
        finally:
            self._scheduler.cancel(request)

    def score(self, token_ids: Sequence[int], ids_TK: np.ndarray) -> np.ndarray:
        """See :meth:`serving.engines.base.Engine.score`; requests go on being answered meanwhile."""
        if ids_TK.ndim != 2 or len(ids_TK) != len(token_ids):
            raise ValueError(f"{len(token_ids)} tokens need ids of shape [{len(token_ids)}, K], not {ids_TK.shape}")
        if len(token_ids) > self.context:
            raise ValueError(f"{len(token_ids)} tokens are more than the context of {self.context}")
        outside = [t for t in (*token_ids, *ids_TK.ravel().tolist()) if not 0 <= t < self._model.vocabulary]
        if outside:
            raise ValueError(f"token id {outside[0]} is outside the vocabulary of {self._model.vocabulary}")
        scores: np.ndarray = self._scheduler.call(self._model.score(token_ids, ids_TK))
        return scores

    async def close(self) -> None:
        """See :meth:`serving.engines.base.Engine.close`."""
        await asyncio.to_thread(self._scheduler.close)
