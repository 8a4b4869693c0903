"""What a caller may ask: the bodies of the two kinds of completion.

A parameter of OpenAI's that this server knows and does not honour is refused by name, never dropped in silence; a
parameter nobody knows is ignored, as OpenAI-compatible servers do.
"""

import json
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from serving.api.errors import ApiError
from serving.engines.base import MAX_LOGPROBS, Sampling

MAX_CHOICES = 8
"""The most answers to one request; each takes a slot."""
MOST = 2**31
"""Beyond every context and every vocabulary; what is larger is a mistake, and would not fit the wire to an arm."""


def _text_or_tokens(value: Any) -> str | list[int]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        if outside := [token for token in value if not 0 <= token < MOST]:
            raise ValueError(f"token ids are 0 or more and below {MOST}, not {str(outside[0])[:24]}")
        return value
    raise ValueError("must be one string or one non-empty list of token ids; several prompts take several requests")


def _stop_strings(value: Any) -> list[str]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError("must be a non-empty string or a list of up to 4 of them")
    return stops


def _plain_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in value
    ):
        return "".join(part["text"] for part in value)
    raise ValueError("must be a string or a list of parts of type text")


class StreamOptions(BaseModel):
    """``include_usage``: a last chunk before ``[DONE]`` with the token counts and no choice."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class Request(BaseModel):
    """What both kinds of completion share. None is the same as left out."""

    model_config = ConfigDict(strict=True)

    # Parameter -> the values that ask for nothing beyond what is done anyway (None always does).
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "logit_bias": ({},),
    }

    model: str = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=MOST)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    stop: Annotated[list[str], BeforeValidator(_stop_strings)] = Field(default_factory=list)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    safety_identifier: str | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "Request":
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options: only allowed with stream true.", param="stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def limit(self) -> int | None:
        """How many tokens to generate at most; None for the rest of the context."""
        return self.max_tokens

    def alternatives(self) -> int | None:
        """How many likely tokens to tell beside each token of the answer; None for no log-probabilities at all."""
        raise NotImplementedError

    @property
    def choices(self) -> int:
        """How many answers are wanted."""
        return self.n or 1

    @property
    def caller(self) -> str | None:
        """Who asks, as the request itself says; ``safety_identifier`` is the newer name and wins."""
        return self.safety_identifier or self.user

    def sampling(self) -> Sampling:
        """The request's wishes over OpenAI's defaults."""
        return Sampling(
            max_tokens=self.limit(),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            stop=tuple(self.stop),
            seed=self.seed,
            logprobs=self.alternatives(),
        )


class CompletionRequest(Request):
    """``POST /v1/completions``; ``max_tokens`` is 16 where not given, as it is at OpenAI."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **Request.unsupported,
        "best_of": (1,),
        "echo": (False,),
        "suffix": ("",),
    }

    prompt: Annotated[str | list[int], BeforeValidator(_text_or_tokens)]
    logprobs: int | None = Field(None, ge=0, le=5)

    def limit(self) -> int | None:
        """See :meth:`Request.limit`."""
        return 16 if self.max_tokens is None else self.max_tokens

    def alternatives(self) -> int | None:
        """See :meth:`Request.alternatives`."""
        return self.logprobs


class Message(BaseModel):
    """One turn of a chat; content given in parts is joined."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_plain_text)]

    def for_template(self) -> dict[str, str]:
        """As chat templates know it: a developer's message is what they call a system message."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class ChatRequest(Request):
    """``POST /v1/chat/completions``; without a limit the answer may fill the context."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **Request.unsupported,
        "audio": (),
        "function_call": ("none",),
        "functions": ([],),
        "modalities": (["text"],),
        "prediction": (),
        "reasoning_effort": ("none",),
        "response_format": ({"type": "text"},),
        "tool_choice": ("none",),
        "tools": ([],),
        "verbosity": (),
        "web_search_options": (),
    }

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs: only allowed with logprobs true.", param="top_logprobs")
        return self

    def limit(self) -> int | None:
        """See :meth:`Request.limit`; ``max_completion_tokens`` is the newer name and wins."""
        return self.max_completion_tokens or self.max_tokens

    def alternatives(self) -> int | None:
        """See :meth:`Request.alternatives`."""
        return (self.top_logprobs or 0) if self.logprobs else None


RequestT = TypeVar("RequestT", bound=Request)


def parse_json(raw: bytes) -> dict[str, Any]:
    """A body as the JSON object that it must be.

    Raises:
        ApiError: status 400.
    """
    try:
        # Not json's: it takes half a character for a whole one, and a thousand brackets for no error of the caller's.
        body = from_json(raw)
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON: {error}.") from error
    if not isinstance(body, dict):
        raise ApiError(400, "The body must be a JSON object.")
    return body


def parse(kind: type[RequestT], raw: bytes) -> RequestT:
    """Read a request's body.

    Raises:
        ApiError: status 400; ``param`` names the first parameter that cannot be used.
    """
    body = parse_json(raw)
    for name, neutral in kind.unsupported.items():
        value = body.get(name)
        if value is not None and value not in neutral:
            allowed = f"; allowed: {', '.join(map(json.dumps, neutral))} or nothing" if neutral else ""
            raise ApiError(
                400, f"{name}: not supported by this server{allowed}.", param=name, code="unsupported_parameter"
            )
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = _path(first["loc"])
        raise ApiError(400, f"{param}: {first['msg'].removeprefix('Value error, ')}.", param=param) from error


def _path(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") -> "messages[0].role", as OpenAI writes it."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location).removeprefix(".")
