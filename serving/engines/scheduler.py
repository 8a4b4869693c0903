"""Continuous batching: requests share forward passes, join while others are generating and leave when they are done.

One thread owns the model and takes one *step* after the other: it lets go of who is gone, reads at most one chunk of
prompts (so a long one holds the others up for a chunk at a time), and generates one token for everybody who is in.

Keys and values have bounded memory. Who does not fit waits; when those who are in outgrow it, the youngest goes back
to the front of the queue with what it has written so far, which is read again later.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from transformers import DynamicCache

from cluster.errors import RunError
from serving.engines.answer import Answer, Chances
from serving.engines.base import Delta, Load, Sampling
from serving.engines.cache import Rows
from serving.engines.model import CausalModel
from serving.engines.sampling import chances, choose, generator_for

# Room that a request must find beyond its own length before it joins, lest it be put out again at once.
_HEADROOM = 64

_serial = count()


@dataclass(eq=False)
class Request:
    """One request on its way through the scheduler, which calls ``emit`` from its own thread."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    answer: Answer
    emit: Callable[[Delta | Exception], None]
    gone: bool = False
    """Nobody reads any more, or it is answered."""
    ids: list[int] = field(init=False)
    """Prompt and answer so far. All but the last are among the keys and values while it is running."""
    cache: DynamicCache | None = None
    """Keys and values while it is joining."""
    generator: torch.Generator | None = field(init=False)
    serial: int = field(default_factory=lambda: next(_serial))

    def __post_init__(self) -> None:
        self.ids = list(self.prompt_ids)
        self.generator = generator_for(self.sampling)

    def end(self, error: Exception) -> None:
        """The request failed."""
        if not self.gone:
            self.gone = True
            self.emit(error)


Job = Generator[None, None, Any]
"""Work of another kind for the model's thread; it runs to its next ``yield`` between two steps."""


class Scheduler:
    """Runs requests on a model in a thread of its own."""

    def __init__(
        self, model: CausalModel, slots: int, kv_tokens: int | None, threads: int, sample: Sequence[int]
    ) -> None:
        """Returns when the model is warm and has shown that it can be batched.

        Args:
            slots: bounds the requests in a batch.
            kv_tokens: bounds the tokens that all may have together; None: as many as memory has room for.
            threads: torch threads.
            sample: some token ids to try the model with.

        Raises:
            UserError: this model cannot be batched.
        """
        self._model = model
        self._rows = Rows(slots, 0, 0)
        self._threads = threads
        self._news = threading.Condition()
        self._waiting: deque[Request] = deque()
        self._jobs: deque[tuple[Job, Future[Any]]] = deque()
        self._joining: Request | None = None
        self._running: list[Request] = []  # in the order of the rows
        self._end: Exception | None = None  # why nothing more will be run
        self._thread = threading.Thread(target=self._main, name="model", daemon=True)
        self._thread.start()
        try:
            self.call(self._prepare(slots, kv_tokens, sample))
        except BaseException:
            self.close()
            raise

    @property
    def load(self) -> Load:
        """Requests that wait for a place and requests that have one."""
        with self._news:  # whoever moves from one to the other is counted once
            return Load(len(self._waiting), len(self._running) + (self._joining is not None))

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RunError: the scheduler was closed or has broken down.
        """
        with self._news:
            self._check()
            self._waiting.append(request)
            self._news.notify()

    def cancel(self, request: Request) -> None:
        """Let go of a request before the next step; does nothing when it is over."""
        with self._news:
            request.gone = True
            self._news.notify()

    def call(self, job: Job) -> Any:
        """Run a job between the steps and wait for what it returns or raises."""
        result: Future[Any] = Future()
        with self._news:
            self._check()
            self._jobs.append((job, result))
            self._news.notify()
        return result.result()

    def close(self) -> None:
        """Fail what is running or waiting, and end the thread."""
        with self._news:
            self._end = self._end or RunError("the engine was closed.")
            self._news.notify()
        self._thread.join()

    def _check(self) -> None:
        if self._end is not None:
            raise RunError(f"the engine runs no more: {self._end}") from self._end

    def _prepare(self, slots: int, kv_tokens: int | None, sample: Sequence[int]) -> Job:
        """In the model's own thread, whose helper threads then are there when the first request comes."""
        self._model.prove(sample)
        tokens = kv_tokens or min(self._model.room(), slots * self._model.context)
        self._model.context = min(self._model.context, tokens)
        self._rows = Rows(slots, tokens, self._model.context)
        return
        yield  # a job is a generator

    @torch.inference_mode()
    def _main(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            while self._wait():
                self._step()
        except Exception as error:  # not a request's: a defect of the scheduler itself
            self._end = error
        with self._news:
            assert self._end is not None
            for request in (*self._running, *([self._joining] if self._joining else ()), *self._waiting):
                request.end(self._end)
            for _, result in self._jobs:
                result.set_exception(self._end)
            self._running, self._joining = [], None
            self._waiting.clear()
            self._jobs.clear()
        self._rows.clear()

    def _wait(self) -> bool:
        """Sleeps while there is nothing to do; False when the end has come."""
        with self._news:
            while not (self._end or self._waiting or self._running or self._joining or self._jobs):
                self._news.wait()
            return self._end is None

    def _step(self) -> None:
        self._let_go()
        self._read_prompts()
        self._generate()
        self._work()

    def _let_go(self) -> None:
        for row in reversed(range(len(self._running))):
            if self._running[row].gone:
                self._leave(row)
        if self._joining is not None and self._joining.gone:
            self._joining = None
        with self._news:
            if any(request.gone for request in self._waiting):
                self._waiting = deque(request for request in self._waiting if not request.gone)

    def _read_prompts(self) -> None:
        left = self._model.chunk
        while left > 0 and (request := self._next()) is not None:
            try:
                left -= self._read(request, left)
            except Exception as error:
                self._joining = None
                request.end(error)

    def _next(self) -> Request | None:
        """Who is joining: one after the other, in the order they came."""
        with self._news:
            if self._joining is None and self._waiting:
                longest = max(len(request.ids) for request in (*self._running, self._waiting[0]))
                width = min(longest + _HEADROOM, self._model.context)
                if self._rows.fits(len(self._running) + 1, width):
                    self._joining = self._waiting.popleft()
                    self._joining.cache = DynamicCache()
        return self._joining

    def _read(self, request: Request, most: int) -> int:
        """Read on in a joining request's prompt; at its end it has its next token and is one of those running."""
        assert request.cache is not None
        done = request.cache.get_seq_length()
        part = request.ids[done : done + most]
        logits_V = self._model.prefill(part, request.cache)
        if done + len(part) == len(request.ids):
            self._give([request], logits_V[None])
            stays = not request.gone  # asked once: it may be cancelled at any time
            if stays:
                self._rows.add(request.cache)
            request.cache = None
            with self._news:
                self._joining = None
                if stays:
                    self._running.append(request)
        return len(part)

    def _generate(self) -> None:
        """One token for everybody."""
        self._make_room()
        if not self._running:
            return
        try:
            logits_BV = self._model.step([request.ids[-1] for request in self._running], self._rows)
            self._give(self._running, logits_BV)
        except Exception as error:
            # Nobody knows whose fault it was, nor what is left of the keys and values.
            for request in self._running:
                request.end(error)
            self._running = []
            self._rows.clear()
        for row in reversed(range(len(self._running))):
            if self._running[row].gone:
                self._leave(row)

    def _make_room(self) -> None:
        while self._running and not self._rows.fits(len(self._running), max(self._rows.length) + 1):
            row = max(range(len(self._running)), key=lambda at: self._running[at].serial)
            request = self._running[row]
            with self._news:
                self._leave(row)
                self._waiting.appendleft(request)

    def _leave(self, row: int) -> None:
        self._rows.remove(row)
        self._running[row] = self._running[-1]
        self._running.pop()

    def _give(self, requests: Sequence[Request], logits_BV: torch.Tensor) -> None:
        """Choose each one's next token and hand on the text that became certain with it."""
        samplings = [request.sampling for request in requests]
        tokens = choose(logits_BV, samplings, [request.generator for request in requests])
        thoughts = chances(logits_BV, tokens, samplings)
        sound = logits_BV.amax(-1).isfinite().tolist()
        for request, token, thought, is_sound in zip(requests, tokens, thoughts, sound, strict=True):
            try:
                if not is_sound:
                    raise RunError("the model computed numbers that are not finite; a wider dtype may help.")
                self._tell(request, token, thought)
            except Exception as error:
                request.end(error)

    @staticmethod
    def _tell(request: Request, token: int, thought: Chances | None) -> None:
        request.ids.append(token)
        delta = request.answer.feed(token, thought)
        if delta is not None and not request.gone:
            # Only ever set: whoever reads may cancel at any time, and that has to stay.
            if delta.finish_reason is not None:
                request.gone = True
            request.emit(delta)

    def _work(self) -> None:
        """The next part of the oldest job."""
        with self._news:
            if not self._jobs:
                return
            job, result = self._jobs[0]
        try:
            next(job)
            return
        except StopIteration as done:
            result.set_result(done.value)
        except Exception as error:
            result.set_exception(error)
        with self._news:
            self._jobs.popleft()
