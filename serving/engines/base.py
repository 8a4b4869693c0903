"""What an arm asks of the thing that runs its model. Importing this module needs no torch.

An engine is a class that offers what :class:`Engine` says. :func:`serving.engines.open_engine` opens one by its name.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

FinishReason = Literal["stop", "length"]

MAX_LOGPROBS = 20
"""The most alternatives per token, as OpenAI allows for chats."""


@dataclass(frozen=True)
class Sampling:
    """How to generate. The defaults are OpenAI's.

    ``max_tokens`` None means as many as the context has room for. ``temperature`` 0 is greedy. ``stop`` strings end
    the text and are not part of it. With a ``seed`` the same request gives the same text on the same machine.

    ``logprobs`` None asks for none; k, 0 to :data:`MAX_LOGPROBS`, for the log-probability of each chosen token and
    for the k most likely tokens at its place. They are those of the model's own distribution: temperature and
    ``top_p`` are not in them, so a chosen token may have a lower one than all its alternatives.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None


class Alternative(NamedTuple):
    """One of the tokens that could have stood at a place. ``logprob`` in nats.

    ``raw`` are the bytes that the token adds to the text. ``token`` is their text; of a token that holds only a part
    of a character it is, as OpenAI writes it, ``bytes:`` and the bytes in hexadecimal: ``bytes:\\xe2\\x82``.
    """

    token_id: int
    token: str
    raw: bytes
    logprob: float


class TokenLogprob(NamedTuple):
    """A token of the answer, with what the model thought of it.

    The first four fields are those of :class:`Alternative`. ``top`` are the most likely tokens at this place, the
    most likely first; the chosen one is among them only if it is that likely. ``text_offset`` is where its text
    begins in the answer, in characters; tokens that share a character share its offset.
    """

    token_id: int
    token: str
    raw: bytes
    logprob: float
    top: tuple[Alternative, ...]
    text_offset: int


@dataclass(frozen=True)
class Accepted:
    """First item of an arm's answer: the request will be run. ``prompt_tokens`` counts the whole prompt."""

    prompt_tokens: int


@dataclass(frozen=True)
class Delta:
    """The next piece of an answer.

    ``completion_tokens`` counts every token generated so far, the end-of-sequence token and those of a stop string
    included. ``finish_reason`` is set on the last piece only: "stop" (end of sequence or stop string) or "length".
    ``logprobs``, when asked for, are those of the tokens whose text begins in this piece or before; over the whole
    answer they are all of its tokens but the end-of-sequence token and those of the stop string.
    """

    text: str
    completion_tokens: int
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Load:
    """How busy an engine is, in requests: ``running`` have a place in the batch, ``waiting`` have none yet."""

    waiting: int
    running: int


class Refused(Exception):  # noqa: N818 (it is an answer, not a failure)
    """This request cannot be run by this model, whoever runs it; ``param`` names what to change."""

    def __init__(self, message: str, param: str, code: str | None = None) -> None:
        super().__init__(message, param, code)
        self.message = message
        self.param = param
        self.code = code


class UnsupportedError(NotImplementedError):
    """This engine cannot do what was asked, whatever the request; the message says which one can."""


class Engine(Protocol):
    """A loaded model that has shown that it works.

    All methods but :meth:`generate` and :meth:`close` may be called from any thread; those two belong to event loops,
    of which there may be several.
    """

    context: int
    """How many tokens prompt and answer may have together."""

    @property
    def load(self) -> Load:
        """How busy it is now."""

    def encode(self, prompt: str) -> list[int]:
        """A text prompt as token ids, with the special tokens the tokenizer puts around a text; never empty.

        Raises:
            Refused: the prompt is empty and the model has no token to begin a text with.
        """

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Messages (``role``, ``content``) as token ids by the model's chat template, opened for the answer.

        Raises:
            Refused: the model has no chat template, or its template does not take these messages.
        """

    def check_tokens(self, token_ids: Sequence[int]) -> None:
        """Raises Refused when a token id is not in the vocabulary."""

    def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        """Generate; the last delta has a ``finish_reason``.

        Closing the generator, or cancelling the task that waits for it, frees the request's place in the batch
        within one step of the model. ``sampling.max_tokens`` is set and fits the context (see :func:`budget`).

        Raises:
            Exception: the model or the device failed; other requests may have failed with it.
        """

    def score(self, token_ids: Sequence[int], ids_TK: np.ndarray) -> np.ndarray:
        """What the model thinks of a finished text: log-probabilities, in nats, of given tokens at every position.

        Blocks until it is done: call it from a thread that may wait.

        Args:
            token_ids: the text, T tokens; no more than the context.
            ids_TK: int, [T, K]. Row t holds the ids that are asked for at the place behind token t.

        Returns:
            float32 [T, K]: log p(ids_TK[t, k] | token_ids[:t + 1]), of the full softmax at temperature 1.

        Raises:
            UnsupportedError: this engine cannot.
            ValueError: the shapes do not belong together, the text is too long or an id is outside the vocabulary.
        """

    async def close(self) -> None:
        """End the generations that are running, with an error, and free the model; done when this returns."""


def budget(prompt_tokens: int, max_tokens: int | None, context: int, param: str) -> int:
    """How many tokens may be generated: ``max_tokens``, or the rest of the context when None. All counts in tokens.

    Raises:
        Refused: prompt and answer do not fit the context together.
    """
    room = context - prompt_tokens
    if room < (max_tokens or 1):
        asked = f"{max_tokens} in the completion" if max_tokens else "at least 1 in the completion"
        raise Refused(
            f"This model's maximum context length is {context} tokens, but {prompt_tokens + (max_tokens or 1)} "
            f"were requested ({prompt_tokens} in the {param}, {asked}). Shorten the {param} or the completion.",
            param=param,
            code="context_length_exceeded",
        )
    return max_tokens or room
