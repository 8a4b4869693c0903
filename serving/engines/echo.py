"""An engine without a model: it answers with the prompt's own tokens, at once.

For measuring what everything around an engine costs, and for tests of clients.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from serving.engines.answer import Answer, Chances
from serving.engines.base import Delta, Load, Refused, Sampling, UnsupportedError

_END = 256
_VOCABULARY = 257
# Every token is as likely as any other.
_LOGPROB = -math.log(_VOCABULARY)


class EchoEngine:
    """Says the prompt again and again until ``max_tokens``; a token is a byte, so any text can be sent.

    Token 256 ends an answer that comes to it. Chats are their messages' contents, a line each. Temperature, ``top_p``
    and seed change nothing; log-probabilities are those of a model that knows nothing.

    See :class:`serving.engines.base.Engine`.
    """

    context: int = 1 << 20

    def __init__(
        self, model_dir: Path | str | None = None, dtype: str = "auto", threads: int = 1, slots: int = 8
    ) -> None:
        """All arguments are those of the other engines and change nothing, but ``slots`` that bounds who runs."""
        self._slots = slots
        self._places = asyncio.Semaphore(slots)
        self._here = 0
        self._running = 0

    @property
    def load(self) -> Load:
        """See :class:`serving.engines.base.Engine`."""
        return Load(self._here - self._running, self._running)

    def encode(self, prompt: str) -> list[int]:
        """The prompt's bytes in UTF-8. See :meth:`serving.engines.base.Engine.encode`."""
        if not prompt:
            raise Refused("The prompt is empty and this model has no token to begin a text with.", param="prompt")
        return list(prompt.encode("utf-8", "replace"))

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """See :meth:`serving.engines.base.Engine.encode_chat`."""
        return self.encode("\n".join(message.get("content") or "" for message in messages) or "\n")

    def check_tokens(self, token_ids: Sequence[int]) -> None:
        """See :meth:`serving.engines.base.Engine.check_tokens`."""
        outside = [token for token in token_ids if not 0 <= token < _VOCABULARY]
        if outside:
            raise Refused(f"Token id {outside[0]} is outside this model's 0 to {_VOCABULARY - 1}.", "prompt")

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        """See :meth:`serving.engines.base.Engine.generate`. Gives way to others after each delta."""
        answer = Answer(self, (_END,), (), sampling)
        self._here += 1
        try:
            async with self._places:
                self._running += 1
                try:
                    for token in islice(cycle(prompt_ids), sampling.max_tokens):
                        delta = answer.feed(token, self._chances(sampling.logprobs))
                        if delta is not None:
                            yield delta
                            if delta.finish_reason is not None:
                                return
                            await asyncio.sleep(0)
                finally:
                    self._running -= 1
        finally:
            self._here -= 1

    def score(self, token_ids: Sequence[int], ids_TK: np.ndarray) -> np.ndarray:
        """Cannot: there is no model. See :meth:`serving.engines.base.Engine.score`."""
        raise UnsupportedError("the echo engine has no model to score with; use the transformers engine.")

    async def close(self) -> None:
        """See :meth:`serving.engines.base.Engine.close`; there is nothing to free."""

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""
        return bytes(token for token in ids if token != _END).decode("utf-8", "replace")

    def raw(self, token: int) -> bytes:
        """The byte that a token is."""
        return bytes([token]) if token != _END else b""

    @staticmethod
    def _chances(k: int | None) -> Chances | None:
        return None if k is None else Chances(_LOGPROB, [(token, _LOGPROB) for token in range(k)])
