"""What an arm asks of the thing that runs its model.

The only engine so far is :class:`serving.transformers_engine.TransformersEngine`; another one (vLLM, continuous
batching) has to offer exactly this. Importing this module needs no torch.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How to generate. The defaults are OpenAI's.

    ``max_tokens`` None means as many as the context has room for. ``temperature`` 0 is greedy. ``stop`` strings end
    the text and are not part of it. With a ``seed`` the same request gives the same text on the same machine.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class Accepted:
    """First item of an arm's answer: the request will be run. ``prompt_tokens`` counts the whole prompt."""

    prompt_tokens: int


@dataclass(frozen=True)
class Delta:
    """The next piece of an answer.

    ``completion_tokens`` counts every token generated so far, the end-of-sequence token and those of a stop string
    included. ``finish_reason`` is set on the last piece only: "stop" (end of sequence or stop string) or "length".
    """

    text: str
    completion_tokens: int
    finish_reason: FinishReason | None = None


class Refused(Exception):  # noqa: N818 (it is an answer, not a failure)
    """This request cannot be run by this model, whoever runs it; ``param`` names what to change."""

    def __init__(self, message: str, param: str, code: str | None = None) -> None:
        super().__init__(message, param, code)
        self.message = message
        self.param = param
        self.code = code


class Engine(Protocol):
    """A loaded model. All methods may be called from several threads at once."""

    context: int
    """How many tokens prompt and answer may have together."""

    def encode(self, prompt: str) -> list[int]:
        """A text prompt as token ids, with the special tokens the tokenizer puts around a text; never empty."""

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Messages (``role``, ``content``) as token ids by the model's chat template, opened for the answer.

        Raises:
            Refused: the model has no chat template, or its template does not take these messages.
        """

    def check_tokens(self, token_ids: Sequence[int]) -> None:
        """Raises Refused when a token id is not in the vocabulary."""

    def generate(self, prompt_ids: Sequence[int], sampling: Sampling, gone: threading.Event) -> Iterator[Delta]:
        """Generate; the last delta has a ``finish_reason``, unless ``gone`` was set on the way.

        ``gone`` says that nobody reads any more: the generation ends within a token. ``sampling.max_tokens`` is set
        and fits the context (see :func:`budget`).
        """


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
