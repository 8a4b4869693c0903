"""One request to an OpenAI-compatible server, its stream read to the end and timed.

aiohttp and not httpx: at a thousand streams it takes a fraction of the time per event, and what the generator takes
it adds to the figures.

Kinds of failure, as :class:`~serving.bench.sample.Sample` names them:

``connect``        no connection
``http_<status>``  answered with another status than 200
``error_event``    an error in the stream
``disconnected``   the connection ended before the answer did
``no_done``        the stream ended in order, but without ``[DONE]``
``empty``          a stream without text and without a reason why it ended
``unreadable``     not HTTP, not an event stream, or not JSON
``timeout``        longer than the time limit
``generator``      this process ran out of file descriptors
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from cluster.errors import RunError
from serving.bench.sample import Sample
from serving.bench.settings import Settings
from serving.bench.sse import sse
from serving.bench.workload import Job, as_text

ARM_HEADER = "x-stillhouse-arm"
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
# Servers close idle connections, many after 5 s; a request sent into that moment would fail through no fault of theirs.
_IDLE_S = 4.0
_LISTING_S = 10.0
# What follows [DONE] is the end of the body; without it the connection could not be used again.
_TAIL_S = 1.0
_DETAIL_CHARACTERS = 300


class AnswerError(Exception):
    """An answer that is none: its kind and what there is to say."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind, self.detail = kind, detail


@dataclass(slots=True)
class _Stream:
    """What has come of one answer. ``times`` are those of events with text."""

    arm: str
    times: list[float] = field(default_factory=list)
    finished: float | None = None
    ended: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int | None = None


class Client:
    """A session with one endpoint; connections are opened as needed, without a limit, and kept for the next request."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._path = "/v1/chat/completions" if settings.api == "chat" else "/v1/completions"

    async def __aenter__(self) -> Client:
        settings = self._settings
        # Compression would hold events back.
        headers = {"Accept-Encoding": "identity"}
        if settings.api_key is not None:
            headers["Authorization"] = f"Bearer {settings.api_key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S),
            timeout=aiohttp.ClientTimeout(total=settings.timeout_s),
            headers=headers,
            # A proxy from the environment has no way to this machine's loopback.
            trust_env=urlsplit(settings.url).hostname not in _LOOPBACK,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def models(self) -> list[dict[str, Any]]:
        """The cards of ``/v1/models``, at least one.

        Raises:
            RunError: there is no such list, or nothing in it.
        """
        url = f"{self._settings.base}/v1/models"
        limit = aiohttp.ClientTimeout(total=min(_LISTING_S, self._settings.timeout_s))
        try:
            async with self._session.get(url, timeout=limit, allow_redirects=False) as response:
                if response.status != 200:
                    raise await _refused(response)
                cards = [{**card, "id": str(card["id"])} for card in json.loads(await response.read())["data"]]
        except Exception as error:
            why = self._hidden(_failure(error).detail)
            raise RunError(f"{url} gave no list of models ({why}); is the endpoint up?") from error
        if not cards:
            raise RunError(f"{self._settings.url} lists no models.")
        return cards

    async def ask(self, job: Job, due: float | None = None) -> Sample:
        """Send one request and read its answer; never raises but when it is cancelled.

        Args:
            due: ``perf_counter()`` of the intended arrival, from which the times count; None means: now.
        """
        sent = perf_counter()
        due = sent if due is None else due
        stream = _Stream(job.model)
        error: AnswerError | None = None
        try:
            await self._send(job, stream)
        except Exception as caught:
            error = _failure(caught)
        tokens = stream.completion_tokens
        first = stream.times[0] if stream.times else None if error else stream.finished
        return Sample(
            arm=stream.arm,
            at=job.at,
            late_ms=(sent - due) * 1000,
            first_token_ms=None if first is None else (first - due) * 1000,
            latency_ms=None if error or stream.ended is None else (stream.ended - due) * 1000,
            prompt_tokens=stream.prompt_tokens,
            completion_tokens=len(stream.times) if tokens is None else tokens,
            counted=tokens is not None,
            gaps_ms=tuple((b - a) * 1000 for a, b in itertools.pairwise(stream.times)),
            error=error.kind if error else None,
            detail=self._hidden(error.detail) if error else "",
        )

    async def _send(self, job: Job, stream: _Stream) -> None:
        body: dict[str, Any] = {
            "model": job.model,
            "max_tokens": job.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._settings.api == "completions":
            body["prompt"] = as_text(job.prompt)
        else:
            chat = job.prompt if isinstance(job.prompt, list) else [{"role": "user", "content": job.prompt}]
            body["messages"] = chat
        url = self._settings.base + self._path
        # Not to another host: it would be measured in this one's place, and be shown the prompts.
        async with self._session.post(url, json=body, allow_redirects=False) as response:
            stream.arm = response.headers.get(ARM_HEADER, job.model)
            if response.status != 200:
                raise await _refused(response)
            if response.content_type == "application/json":
                raise AnswerError("unreadable", "it answered with JSON where a stream of events was asked for")
            await _read(response, stream)

    def _hidden(self, text: str) -> str:
        """An error in one line, without the API key, which some servers repeat."""
        if self._settings.api_key:
            text = text.replace(self._settings.api_key, "***")
        return " ".join(text.split())[:_DETAIL_CHARACTERS]


async def _read(response: aiohttp.ClientResponse, stream: _Stream) -> None:
    async for now, data in sse(response.content.iter_any()):
        if data.strip() == "[DONE]":
            stream.ended = now
            break
        event = json.loads(data)
        if event.get("error"):
            raise AnswerError("error_event", _message(event["error"]))
        _note(event, now, stream)
    if stream.ended is None:
        raise AnswerError("no_done", "the stream ended before [DONE]")
    if not stream.times and stream.finished is None:
        raise AnswerError("empty", "a stream without text and without a finish_reason")
    with suppress(aiohttp.ClientError, asyncio.TimeoutError):
        await asyncio.wait_for(_drain(response), _TAIL_S)


async def _drain(response: aiohttp.ClientResponse) -> None:
    async for _ in response.content.iter_any():
        pass


def _note(event: Mapping[str, Any], now: float, stream: _Stream) -> None:
    """Take down what one event says."""
    for choice in event["choices"]:
        delta = choice.get("delta") or {}
        # What a model thinks is output too, and has other names.
        if choice.get("text") or any(delta.get(name) for name in ("content", "reasoning_content", "reasoning")):
            stream.times.append(now)
        if choice.get("finish_reason") and stream.finished is None:
            stream.finished = now  # an answer may be empty: then its end is its first token
    if usage := event.get("usage"):
        stream.completion_tokens = int(usage["completion_tokens"])
        stream.prompt_tokens = int(usage.get("prompt_tokens") or 0)


async def _refused(response: aiohttp.ClientResponse) -> AnswerError:
    body = await response.read()
    try:
        message = _message(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        message = body[:_DETAIL_CHARACTERS].decode(errors="replace")
    return AnswerError(f"http_{response.status}", f"{response.status} {message}")


def _message(error: Any) -> str:
    return str(error["message"] if isinstance(error, Mapping) and "message" in error else error)


def _failure(error: Exception) -> AnswerError:
    """What kind of failure an exception means."""
    if isinstance(error, AnswerError):
        return error
    detail = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    number = getattr(error, "errno", None)
    if number in (errno.EMFILE, errno.ENFILE):
        return AnswerError("generator", detail)
    kinds: list[tuple[type[Exception], str]] = [
        (asyncio.TimeoutError, "timeout"),
        (aiohttp.ClientConnectorError, "connect"),
        (aiohttp.ClientOSError, "disconnected"),
        (aiohttp.ServerDisconnectedError, "disconnected"),
        (aiohttp.ClientPayloadError, "disconnected"),
    ]
    return AnswerError(next((kind for base, kind in kinds if isinstance(error, base)), "unreadable"), detail)
