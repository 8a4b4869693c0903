"""Drives a run: warm-up, then a closed or an open loop of requests, then the figures."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import resource
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from cluster.errors import RunError, UserError
from serving.bench.arrivals import Arrival, poisson, read_trace
from serving.bench.client import Client
from serving.bench.lengths import Length
from serving.bench.result import BenchResult, summarise_run
from serving.bench.sample import Sample
from serving.bench.settings import DEFAULT_REQUESTS, Settings
from serving.bench.workload import Job, Prompt, WordScale, jobs, read_prompts, synthetic
from serving.prompts import PROMPTS

# An event loop's timer is true to a millisecond; what is left is waited for by asking again and again.
_TIMER_S = 0.001
_HEARTBEAT_S = 0.02
_PROGRESS_S = 0.5
_SCALE_WORDS = (4, 36)


@dataclass(slots=True)
class Progress:
    """How far a run has come; ``total`` requests or ``duration_s`` are None where they do not limit it."""

    total: int | None
    duration_s: float | None
    sent: int = 0
    done: int = 0
    errors: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class _Record:
    """What a run gathers. ``lags_ms`` are how late the event loop woke up from naps: what it adds to every time."""

    progress: Progress
    started: float = field(default_factory=perf_counter)
    samples: list[Sample] = field(default_factory=list)
    lags_ms: list[float] = field(default_factory=list)

    def add(self, sample: Sample) -> None:
        self.samples.append(sample)
        self.progress.done += 1
        self.progress.errors += sample.error is not None


def run_bench(
    url: str,
    requests: int,
    concurrency: int,
    max_tokens: int,
    prompts: Sequence[Prompt],
    models: Sequence[str] | None = None,
) -> BenchResult:
    """A closed loop, for callers without an event loop; see :func:`measure`."""
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}; allowed: 1 or more.")
    settings = Settings(
        url,
        models=None if models is None else tuple(models),
        requests=requests,
        concurrency=concurrency,
        max_tokens=Length("fixed", (float(max_tokens),)),
    )
    return asyncio.run(measure(settings, prompts))


async def measure(
    settings: Settings, prompts: Sequence[Prompt] | None = None, show: Callable[[Progress], None] | None = None
) -> BenchResult:
    """Send requests and time the answers, per arm that gave them.

    Args:
        prompts: taken in turn; None means those of the settings' file, else some short questions.
        show: called twice a second while requests are under way.

    Raises:
        UserError: something in the settings or a file that they name cannot be used; nothing has been sent.
        RunError: the endpoint cannot be reached, or not one request of the warm-up or of the run was answered.
    """
    settings.check()
    trace = read_trace(settings.trace) if settings.trace else None
    if prompts is None:
        prompts = read_prompts(settings.prompts) if settings.prompts else PROMPTS
    if not prompts:
        raise UserError("no prompts given; give at least one.")
    _allow_many_connections()
    async with Client(settings) as client:
        targets, ready = await _models(client, settings)
        await _warm_up(client, settings, ready, prompts[0])
        scales: dict[str, WordScale] = {}
        if settings.prompt_tokens or any(arrival.prompt_tokens for arrival in trace or ()):
            scales = {model: await _scale(client, model, settings.seed) for model in targets}
        total = _total(settings, len(targets), trace)
        due = _arrivals(settings, trace, total)
        with _without_what_is_there():
            record = _Record(Progress(total, settings.duration_s))
            clock = time.time()
            async with _heartbeat(record, show):
                work = jobs(settings, due, prompts, targets, scales)
                await (_open_loop if settings.open_loop else _closed_loop)(client, settings, work, record)
            seconds = perf_counter() - record.started
    record.samples.sort(key=lambda sample: sample.at)
    return summarise_run(settings, record.samples, seconds, clock, record.lags_ms)


@contextlib.contextmanager
def _without_what_is_there() -> Iterator[None]:
    """Within the block the garbage collector looks at new objects only: a look at all of them takes tens of ms."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


async def _models(client: Client, settings: Settings) -> tuple[list[str], list[str]]:
    """The models to measure, and those to warm up before.

    Behind the first name that a Stillhouse endpoint lists stand all the others, its arms. Another server's list may be
    long, and each of its models cost money.
    """
    if settings.models:
        return list(settings.models), list(dict.fromkeys(settings.models))
    cards = await client.models()
    ours = all(card.get("owned_by") == "stillhouse" for card in cards)
    names = [card["id"] for card in cards]
    return names[:1], names if ours else names[:1]


async def _warm_up(client: Client, settings: Settings, models: Sequence[str], prompt: Prompt) -> None:
    limit = (settings.max_tokens or Length("fixed", (32.0,))).draw(np.random.default_rng([settings.seed, 5]))
    samples = [await client.ask(Job(model, prompt, limit)) for _ in range(settings.warmup) for model in models]
    if samples and all(sample.error for sample in samples):
        raise RunError(_nothing(samples, settings.url, "warm-up requests"))


def _nothing(samples: Sequence[Sample], url: str, what: str) -> str:
    detail, count = Counter(f"{sample.arm}: {sample.detail}" for sample in samples).most_common(1)[0]
    return f"none of {len(samples)} {what} to {url} was answered; {count} times {detail}."


async def _scale(client: Client, model: str, seed: int) -> WordScale:
    """How a model's server counts words, from two requests; the default where it gives no counts."""
    measured = []
    for words in _SCALE_WORDS:
        text = synthetic(words, np.random.default_rng([seed, 6, words]))
        sample = await client.ask(Job(model, text, 1))
        measured.append((words, sample.prompt_tokens))
    return WordScale.through(*measured)


def _total(settings: Settings, models: int, trace: Sequence[Arrival] | None) -> int | None:
    """How many requests limit the run over all models, if so."""
    if settings.requests is not None:
        wanted = settings.requests * models
        return wanted if trace is None else min(wanted, len(trace))
    if trace is not None:
        return sum(settings.duration_s is None or arrival.at < settings.duration_s for arrival in trace)
    return None if settings.duration_s is not None else DEFAULT_REQUESTS * models


def _arrivals(settings: Settings, trace: Sequence[Arrival] | None, total: int | None) -> Iterable[Arrival]:
    due: Iterable[Arrival]
    if trace is not None:
        due = trace
    elif settings.rate is not None:
        due = poisson(settings.rate, settings.seed)
    else:
        due = itertools.repeat(Arrival(0.0))
    limit = settings.duration_s
    if limit is not None and settings.open_loop:
        due = itertools.takewhile(lambda arrival: arrival.at < limit, due)
    return itertools.islice(due, total)


async def _closed_loop(client: Client, settings: Settings, work: Iterator[Job], record: _Record) -> None:
    limit = settings.duration_s

    async def one_client() -> None:
        for job in work:  # shared: each is taken by one client
            at = perf_counter() - record.started
            if limit is not None and at >= limit:
                return
            record.progress.sent += 1
            record.add(await client.ask(Job(job.model, job.prompt, job.max_tokens, at)))

    await asyncio.gather(*(one_client() for _ in range(settings.clients)))


async def _open_loop(client: Client, settings: Settings, work: Iterator[Job], record: _Record) -> None:
    """Each request is a task of its own, which begins when it is due and waits for no other."""
    waiting: set[asyncio.Task[None]] = set()

    async def one_request(job: Job, due: float) -> None:
        record.add(await client.ask(job, due))

    for job in work:
        due = record.started + job.at
        await _until(due)
        record.progress.sent += 1
        task = asyncio.create_task(one_request(job, due))
        waiting.add(task)
        task.add_done_callback(waiting.discard)
    await asyncio.gather(*waiting)


async def _until(moment: float) -> None:
    """Wait, to some ten microseconds where the machine allows; a moment that is past lets others go first once."""
    if (left := moment - perf_counter() - _TIMER_S) > 0:
        await asyncio.sleep(left)
    while True:
        await asyncio.sleep(0)
        if perf_counter() >= moment:
            return


@contextlib.asynccontextmanager
async def _heartbeat(record: _Record, show: Callable[[Progress], None] | None) -> AsyncIterator[None]:
    """Notes how late the event loop is, and shows the progress."""

    async def beat() -> None:
        shown = before = record.started
        while True:
            await asyncio.sleep(_HEARTBEAT_S)
            now = perf_counter()
            lag = now - before - _HEARTBEAT_S
            record.lags_ms.append(max(0.0, lag) * 1000)
            # The beats that a long stall left out would have been late too.
            record.lags_ms.extend(1000 * missed for missed in np.arange(lag - _HEARTBEAT_S, 0, -_HEARTBEAT_S))
            before = now
            if show and now - shown >= _PROGRESS_S:
                shown = now
                record.progress.seconds = now - record.started
                show(record.progress)

    task = asyncio.create_task(beat())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


def _allow_many_connections() -> None:
    """An open loop against a slow server holds many connections; the soft limit on files is often 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
