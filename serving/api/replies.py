"""What goes back: whole answers, the chunks of a stream, and the lists of models."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii
from typing import Any

from serving.api.requests import ChatRequest, Request
from serving.engines.base import Alternative, Delta, FinishReason, TokenLogprob

Json = dict[str, Any]
DONE = "data: [DONE]\n\n"
# Stands for the text in an event; no name that is echoed has it.
_PLACE = "\0"


def sse(body: Json) -> str:
    """One server-sent event. ASCII only: a raw U+2028 in the text would end the line for some clients."""
    return f"data: {json.dumps(body)}\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """Token counts of one request; those of several answers are added."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def model_list(names: Sequence[str], created: int) -> Json:
    """``GET /v1/models``; ``created`` in seconds since 1970."""
    return {"object": "list", "data": [model_card(name, created) for name in names]}


def model_card(name: str, created: int) -> Json:
    """``GET /v1/models/{name}``"""
    return {"id": name, "object": "model", "created": created, "owned_by": "stillhouse"}


@dataclass
class Choice:
    """One answer as it grows."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    completion_tokens: int = 0
    finish_reason: FinishReason | None = None

    def add(self, delta: Delta) -> None:
        """Its next piece."""
        self.text.append(delta.text)
        self.logprobs += delta.logprobs
        self.completion_tokens = delta.completion_tokens
        self.finish_reason = delta.finish_reason


class Reply:
    """Builds one request's answer: whole, or as the chunks of a stream. ``model`` is echoed as it was asked for."""

    def __init__(self, request: Request, prompt_tokens: int) -> None:
        self._chat = isinstance(request, ChatRequest)
        self._model = request.model
        self._include_usage = request.include_usage
        self._logprobs = request.alternatives() is not None
        self._prompt_tokens = prompt_tokens
        self._id = f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._around: dict[int, list[str]] = {}

    def whole(self, choices: Sequence[Choice]) -> Json:
        """The answer of a request that does not stream."""
        bodies = []
        for index, choice in enumerate(choices):
            text = "".join(choice.text)
            content = (
                {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
            )
            bodies.append(self._choice(index, content, choice.finish_reason, choice.logprobs))
        counts = usage(self._prompt_tokens, sum(choice.completion_tokens for choice in choices))
        return {**self._body("chat.completion", bodies), "usage": counts}

    def opening(self, index: int) -> Json | None:
        """The chunk before any text: a chat says who speaks."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}) if self._chat else None

    def piece(self, index: int, delta: Delta) -> Json:
        """A chunk with text."""
        content = {"delta": {"content": delta.text}} if self._chat else {"text": delta.text}
        return self._chunk(index, content, logprobs=delta.logprobs)

    def text_event(self, index: int, text: str) -> str:
        """The event of a chunk with text alone. What is the same in all of a stream's chunks is written out once."""
        if index not in self._around:
            event = sse(self.piece(index, Delta(_PLACE, 0)))
            self._around[index] = event.split(json.dumps(_PLACE))
        return encode_basestring_ascii(text).join(self._around[index])

    def closing(self, index: int, finish_reason: FinishReason) -> Json:
        """The chunk that says why the text ended."""
        return self._chunk(index, {"delta": {}} if self._chat else {"text": ""}, finish_reason)

    def counts(self, completion_tokens: int) -> Json | None:
        """The chunk with the token counts, if it was asked for."""
        if not self._include_usage:
            return None
        return {**self._body("chat.completion.chunk", []), "usage": usage(self._prompt_tokens, completion_tokens)}

    def _chunk(
        self,
        index: int,
        content: Json,
        finish_reason: FinishReason | None = None,
        logprobs: Sequence[TokenLogprob] = (),
    ) -> Json:
        body = self._body("chat.completion.chunk", [self._choice(index, content, finish_reason, logprobs)])
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

    def _choice(
        self, index: int, content: Json, finish_reason: FinishReason | None, logprobs: Sequence[TokenLogprob]
    ) -> Json:
        shown = None
        if self._logprobs:
            shown = _chat_logprobs(logprobs) if self._chat else _completion_logprobs(logprobs)
        return {"index": index, **content, "logprobs": shown, "finish_reason": finish_reason}


def _chat_logprobs(tokens: Sequence[TokenLogprob]) -> Json:
    def entry(token: TokenLogprob | Alternative) -> Json:
        return {"token": token.token, "logprob": token.logprob, "bytes": list(token.raw)}

    content = [{**entry(token), "top_logprobs": [entry(other) for other in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _completion_logprobs(tokens: Sequence[TokenLogprob]) -> Json:
    # The older shape: the chosen token is among the alternatives even where it is less likely than they are.
    tops = [{**{other.token: other.logprob for other in token.top}, token.token: token.logprob} for token in tokens]
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": tops if any(token.top for token in tokens) else None,
        "text_offset": [token.text_offset for token in tokens],
    }
