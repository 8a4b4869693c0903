"""A closed-loop load generator for OpenAI-compatible chat endpoints, with one line of results per arm.

Each of ``concurrency`` clients sends a streaming request, reads it to the end and sends the next: the load adapts
to the server, and times are those of a client that waits for its answer. Works on any server that speaks the API;
one that names no arm in its header is reported by the model's name.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from rich import box
from rich.table import Table

from cluster.errors import RunError, UserError

ARM_HEADER = "x-stillhouse-arm"
_QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


@dataclass(frozen=True)
class Sample:
    """One request. Times in ms from sending it; ``first_token_ms`` to the first text, ``latency_ms`` to the end.

    A failed request has an ``error`` and no times.
    """

    arm: str
    first_token_ms: float = 0.0
    latency_ms: float = 0.0
    tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class ArmResult:
    """What one arm showed. ``count`` answers and ``errors`` failures; quantiles in ms over the answers.

    ``tokens_per_s`` is what one client sees: output tokens over the time its requests took.
    """

    arm: str
    count: int
    errors: int
    first_token_ms: dict[str, float]
    latency_ms: dict[str, float]
    tokens_per_s: float


@dataclass(frozen=True)
class BenchResult:
    """A whole run. ``seconds`` is its duration without the warm-up, ``tokens_per_s`` all output over it."""

    url: str
    concurrency: int
    max_tokens: int
    seconds: float
    tokens_per_s: float
    arms: list[ArmResult]
    errors: dict[str, int] = field(default_factory=dict)
    """What went wrong ("arm: what") -> how often."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, the same names; an arm that never answered has empty quantiles."""
        return {**vars(self), "arms": [vars(arm) for arm in self.arms]}

    def table(self) -> Table:
        """For the terminal."""
        title = f"{self.url} · {self.concurrency} at a time · up to {self.max_tokens} tokens each"
        table = Table(title=title, box=box.SIMPLE)
        table.add_column("arm", overflow="fold")
        spread = "/".join(_QUANTILES)
        for head in ("answers", "errors", f"first token ms\n{spread}", f"latency ms\n{spread}", "tokens/s"):
            table.add_column(head, justify="right", no_wrap=True)
        for arm in self.arms:
            times = [
                "/".join(f"{quantiles[q]:.0f}" for q in _QUANTILES) if quantiles else "-"
                for quantiles in (arm.first_token_ms, arm.latency_ms)
            ]
            table.add_row(arm.arm, str(arm.count), str(arm.errors), *times, f"{arm.tokens_per_s:.1f}")
        if self.errors:
            table.caption = "; ".join(f"{count} times {what}" for what, count in self.errors.items())
        return table


def run_bench(
    url: str,
    requests: int,
    concurrency: int,
    max_tokens: int,
    prompts: Sequence[str],
    models: Sequence[str] | None = None,
) -> BenchResult:
    """:func:`measure`, for callers without an event loop."""
    return asyncio.run(measure(url, requests, concurrency, max_tokens, prompts, models))


async def measure(
    url: str,
    requests: int,
    concurrency: int,
    max_tokens: int,
    prompts: Sequence[str],
    models: Sequence[str] | None = None,
) -> BenchResult:
    """Send chats and time the answers, per arm that gave them.

    Before the clock starts every model gets one warm-up request, which is not counted.

    Args:
        url: the endpoint's base, without ``/v1``.
        requests: how many to send; with ``models``, how many to *each* of them.
        concurrency: clients at a time.
        max_tokens: limit of each answer, in tokens.
        prompts: user messages, taken in turn.
        models: send each prompt to each of these in turn, so that they are measured under the same conditions. None
            sends to the first model the endpoint lists: a Stillhouse endpoint's own name, which splits by weight.

    Raises:
        UserError: a number below 1, no prompts, or a URL that is none.
        RunError: the endpoint cannot be reached, or not one request was answered.
    """
    for name, value in (("requests", requests), ("concurrency", concurrency), ("max_tokens", max_tokens)):
        if value < 1:
            raise UserError(f"{name} is {value}; allowed: 1 or more.")
    if not prompts:
        raise UserError("no prompts given; give at least one.")
    if models is not None and not models:
        raise UserError("an empty list of models given; name at least one, or leave it out for the endpoint's split.")

    async with _client(url, concurrency) as client:
        listed = await _listed_models(client, url)
        targets = list(models) if models else listed[:1]
        for model in models or listed:
            await _chat(client, model, prompts[0], max_tokens)
        jobs = (
            (targets[i % len(targets)], prompts[i // len(targets) % len(prompts)])
            for i in range(requests * len(targets))
        )
        start = time.perf_counter()
        samples = await _closed_loop(client, jobs, concurrency, max_tokens)
        seconds = time.perf_counter() - start
    return summarise(url, concurrency, max_tokens, seconds, samples)


def summarise(url: str, concurrency: int, max_tokens: int, seconds: float, samples: Sequence[Sample]) -> BenchResult:
    """Per-arm quantiles (linear interpolation) from the samples of a run of ``seconds``.

    Raises:
        RunError: not one sample is an answer.
    """
    errors = Counter(f"{sample.arm}: {sample.error}" for sample in samples if sample.error)
    if errors.total() == len(samples):
        what, count = errors.most_common(1)[0]
        raise RunError(f"none of {len(samples)} requests to {url} was answered; {count} times {what}.")
    arms = []
    for name in sorted({sample.arm for sample in samples}):
        of_arm = [sample for sample in samples if sample.arm == name]
        answers = [sample for sample in of_arm if not sample.error]
        spent_s = sum(sample.latency_ms for sample in answers) / 1000
        arms.append(
            ArmResult(
                arm=name,
                count=len(answers),
                errors=len(of_arm) - len(answers),
                first_token_ms=_quantiles(sample.first_token_ms for sample in answers),
                latency_ms=_quantiles(sample.latency_ms for sample in answers),
                tokens_per_s=sum(sample.tokens for sample in answers) / spent_s if spent_s else 0.0,
            )
        )
    total = sum(sample.tokens for sample in samples)
    return BenchResult(url, concurrency, max_tokens, seconds, total / seconds, arms, dict(errors.most_common()))


def _quantiles(values: Iterable[float]) -> dict[str, float]:
    array = np.fromiter(values, dtype=np.float64)
    return {name: float(np.quantile(array, q)) for name, q in _QUANTILES.items()} if array.size else {}


def _client(url: str, concurrency: int) -> httpx.AsyncClient:
    try:
        base = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UserError(f"{url!r} is not a URL ({error}); give one like http://127.0.0.1:8000.") from error
    if base.scheme not in ("http", "https") or not base.host:
        raise UserError(f"{url!r} is not an HTTP URL; give one like http://127.0.0.1:8000.")
    return httpx.AsyncClient(
        base_url=base,
        timeout=httpx.Timeout(300.0, connect=10.0),
        limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        # A proxy from the environment has no way to this machine's loopback.
        trust_env=base.host not in _LOOPBACK,
    )


async def _listed_models(client: httpx.AsyncClient, url: str) -> list[str]:
    try:
        response = await client.get("/v1/models")
        response.raise_for_status()
        names = [str(card["id"]) for card in response.json()["data"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{url}/v1/models gave no list of models ({_name(error)}); is the endpoint up?") from error
    if not names:
        raise RunError(f"{url} lists no models.")
    return names


async def _closed_loop(
    client: httpx.AsyncClient, jobs: Iterator[tuple[str, str]], concurrency: int, max_tokens: int
) -> list[Sample]:
    samples: list[Sample] = []

    async def one_client() -> None:
        for model, prompt in jobs:  # shared: each job is taken by one client
            samples.append(await _chat(client, model, prompt, max_tokens))

    await asyncio.gather(*(one_client() for _ in range(concurrency)))
    return samples


async def _chat(client: httpx.AsyncClient, model: str, prompt: str, max_tokens: int) -> Sample:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    arm = model
    start = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            arm = response.headers.get(ARM_HEADER, model)
            if response.status_code != 200:
                return Sample(arm, error=_refusal(response.status_code, await response.aread()))
            return await _read(response, arm, start)
    except httpx.HTTPError as error:
        return Sample(arm, error=_name(error))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        return Sample(arm, error=f"unreadable stream: {_name(error)}")


async def _read(response: httpx.Response, arm: str, start: float) -> Sample:
    first: float | None = None
    tokens: int | None = None
    async for data in _sse(response):
        now = (time.perf_counter() - start) * 1000
        if data == "[DONE]":
            if first is None or tokens is None:
                return Sample(arm, error="stream without text or without usage")
            return Sample(arm, first, now, tokens)
        event = json.loads(data)
        if "error" in event:
            return Sample(arm, error=str(event["error"]["message"]))
        for choice in event["choices"]:
            # An answer may be empty: then its end is its first token.
            if first is None and (choice["delta"].get("content") or choice["finish_reason"]):
                first = now
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
    return Sample(arm, error="stream broke off before [DONE]")


async def _sse(response: httpx.Response) -> AsyncIterator[str]:
    """The ``data:`` of each event. Split on the bytes: httpx's lines also end at U+2028, legal in JSON."""
    rest = b""
    async for chunk in response.aiter_bytes():
        *events, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    yield line.removeprefix(b"data:").decode().strip()


def _refusal(status: int, body: bytes) -> str:
    try:
        return f"{status} {json.loads(body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{status} {body[:200].decode(errors='replace')}"


def _name(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
