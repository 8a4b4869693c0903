"""OpenAI's wire shapes: what comes in, what goes out, and how errors look.

A parameter of OpenAI's that this server knows and does not honour is refused by name, never dropped in silence; a
parameter nobody knows is ignored, as OpenAI-compatible servers do.
"""

import json
import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from serving.engine import FinishReason, Sampling

Json = dict[str, Any]


class ApiError(Exception):
    """An answer other than success: ``status`` is the HTTP status, the rest is OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> Json:
        """``{"error": {message, type, param, code}}``"""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


# ---- requests ----


def _text_or_tokens(value: Any) -> str | list[int]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(token) is int for token in value):
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
        "n": (1,),
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "logit_bias": ({},),
    }

    model: str = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    stop: Annotated[list[str], BeforeValidator(_stop_strings)] = Field(default_factory=list)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

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

    def sampling(self) -> Sampling:
        """The request's wishes over OpenAI's defaults."""
        return Sampling(
            max_tokens=self.limit(),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            stop=tuple(self.stop),
            seed=self.seed,
        )


class CompletionRequest(Request):
    """``POST /v1/completions``; ``max_tokens`` is 16 where not given, as it is at OpenAI."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **Request.unsupported,
        "best_of": (1,),
        "echo": (False,),
        "logprobs": (),
        "suffix": ("",),
    }

    prompt: Annotated[str | list[int], BeforeValidator(_text_or_tokens)]

    def limit(self) -> int | None:
        """See :meth:`Request.limit`."""
        return 16 if self.max_tokens is None else self.max_tokens


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
        "logprobs": (False,),
        "modalities": (["text"],),
        "prediction": (),
        "reasoning_effort": ("none",),
        "response_format": ({"type": "text"},),
        "tool_choice": ("none",),
        "tools": ([],),
        "top_logprobs": (0,),
        "verbosity": (),
        "web_search_options": (),
    }

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    def limit(self) -> int | None:
        """See :meth:`Request.limit`; ``max_completion_tokens`` is the newer name and wins."""
        return self.max_completion_tokens or self.max_tokens


RequestT = TypeVar("RequestT", bound=Request)


def parse(kind: type[RequestT], raw: bytes) -> RequestT:
    """Read a request's body.

    Raises:
        ApiError: status 400; ``param`` names the first parameter that cannot be used.
    """
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON: {error}.") from error
    if not isinstance(body, dict):
        raise ApiError(400, "The body must be a JSON object.")
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


# ---- answers ----


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """Token counts of one request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def model_list(names: list[str], created: int) -> Json:
    """``GET /v1/models``; ``created`` in seconds since 1970."""
    return {"object": "list", "data": [model_card(name, created) for name in names]}


def model_card(name: str, created: int) -> Json:
    """``GET /v1/models/{name}``"""
    return {"id": name, "object": "model", "created": created, "owned_by": "stillhouse"}


class Reply:
    """Builds one request's answer: whole, or as the chunks of a stream. ``model`` is echoed as it was asked for."""

    def __init__(self, request: Request, prompt_tokens: int) -> None:
        self._chat = isinstance(request, ChatRequest)
        self._model = request.model
        self._include_usage = request.include_usage
        self._prompt_tokens = prompt_tokens
        self._id = f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, text: str, finish_reason: FinishReason | None, completion_tokens: int) -> Json:
        """The answer of a request that does not stream."""
        content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        body = self._body("chat.completion", [self._choice(content, finish_reason)])
        return {**body, "usage": usage(self._prompt_tokens, completion_tokens)}

    def opening(self) -> Json | None:
        """The chunk before any text: a chat says who speaks."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, None) if self._chat else None

    def piece(self, text: str) -> Json:
        """A chunk with text."""
        return self._chunk({"delta": {"content": text}} if self._chat else {"text": text}, None)

    def closing(self, finish_reason: FinishReason) -> Json:
        """The chunk that says why the text ended."""
        return self._chunk({"delta": {}} if self._chat else {"text": ""}, finish_reason)

    def counts(self, completion_tokens: int) -> Json | None:
        """The chunk with the token counts, if it was asked for."""
        if not self._include_usage:
            return None
        return {
            **self._body("chat.completion.chunk", []),
            "usage": usage(self._prompt_tokens, completion_tokens),
        }

    def _chunk(self, content: Json, finish_reason: FinishReason | None) -> Json:
        body = self._body("chat.completion.chunk", [self._choice(content, finish_reason)])
        # With include_usage every chunk has the field, and only the last one a value.
        return {**body, "usage": None} if self._include_usage else body

    def _body(self, chat_object: str, choices: list[Json]) -> Json:
        return {
            "id": self._id,
            "object": chat_object if self._chat else "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    @staticmethod
    def _choice(content: Json, finish_reason: FinishReason | None) -> Json:
        return {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}


DONE = "data: [DONE]\n\n"


def sse(body: Json) -> str:
    """One server-sent event. ASCII only: a raw U+2028 in the text would end the line for some clients."""
    return f"data: {json.dumps(body)}\n\n"
