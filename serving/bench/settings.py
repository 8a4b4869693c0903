"""What a run may be told, and what cannot be meant."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from cluster.errors import UserError
from serving.bench.lengths import Length

API_KEY_VARIABLE = "STILLHOUSE_API_KEY"
DEFAULT_REQUESTS = 32
DEFAULT_MAX_TOKENS = Length("fixed", (32.0,))
Api = Literal["chat", "completions"]


@dataclass(frozen=True)
class Settings:
    """One run.

    Without ``rate`` and ``trace`` the loop is closed: ``concurrency`` clients (default 1) each wait for their answer
    before they ask again. With one of them it is open: requests come when they are due, whatever the server does.
    """

    url: str
    """The endpoint's base; a ``/v1`` at its end may be left out."""

    models: tuple[str, ...] | None = None
    """Asked in turn with the same prompts. None asks the first model that the endpoint lists."""

    concurrency: int | None = None
    rate: float | None = None
    """Poisson arrivals per second, over all models."""

    trace: Path | None = None
    """Arrivals from a file, see :data:`serving.bench.arrivals.TRACE_FORM`."""

    requests: int | None = None
    """How many; with ``models``, to each of them. Default 32, but all of a trace or ``duration_s`` where given."""

    duration_s: float | None = None
    """No request begins later than this. With ``requests`` too, what comes first ends the run."""

    warmup: int = 1
    """Requests to each model before the clock starts."""

    timeout_s: float = 300.0
    """Longest that one request may take from its sending on."""

    prompts: Path | None = None
    """A file of prompts, see :data:`serving.bench.workload.PROMPTS_FORM`."""

    prompt_tokens: Length | None = None
    """Synthetic prompts of such lengths."""

    max_tokens: Length | None = None
    """Limits of the answers' lengths. None: those of the trace, else 32."""

    api: Api = "chat"
    seed: int = 0
    """Of arrivals, lengths, synthetic text and the intervals' resampling."""

    api_key: str | None = field(default=None, repr=False)

    @property
    def open_loop(self) -> bool:
        """Whether requests come when they are due, not when others have ended."""
        return self.rate is not None or self.trace is not None

    @property
    def clients(self) -> int:
        """Clients of the closed loop."""
        return 1 if self.concurrency is None else self.concurrency

    @property
    def base(self) -> str:
        """The URL that ``/v1/...`` is put behind."""
        return self.url.rstrip("/").removesuffix("/v1").rstrip("/")

    @property
    def load(self) -> str:
        """The load in words, for titles."""
        if self.trace is not None:
            return f"open loop, arrivals of {self.trace.name}"
        if self.rate is not None:
            return f"open loop, {self.rate:g} requests/s (Poisson)"
        return f"closed loop, {self.clients} at a time"

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; the API key is not in it."""
        row = {**vars(self), "load": self.load}
        del row["api_key"]
        for name in ("trace", "prompts", "prompt_tokens"):
            row[name] = None if row[name] is None else str(row[name])
        row["max_tokens"] = str(self.max_tokens or DEFAULT_MAX_TOKENS)
        row["concurrency"] = None if self.open_loop else self.clients
        return row

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UserError: see its message.
        """
        _check_url(self.url)
        numbers = {"requests": self.requests, "concurrency": self.concurrency}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; allowed: 1 or more.")
        if self.warmup < 0:
            raise UserError(f"warmup is {self.warmup}; allowed: 0 or more.")
        spans = {"rate": self.rate, "duration": self.duration_s, "timeout": self.timeout_s}
        for name, span in spans.items():
            if span is not None and not (math.isfinite(span) and span > 0):
                raise UserError(f"{name} is {span:g}; allowed: a finite number above 0.")
        if self.rate is not None and self.trace is not None:
            raise UserError("both rate and trace given; give one: each says when requests are due.")
        if self.open_loop and self.concurrency is not None:
            raise UserError(
                "concurrency is of the closed loop; leave it out where rate or trace say when requests are due."
            )
        if self.prompts is not None and self.prompt_tokens is not None:
            raise UserError("both prompts and prompt_tokens given; give one: a file, or lengths of synthetic prompts.")
        if self.models is not None and not self.models:
            raise UserError(
                "an empty list of models given; name at least one, or leave it out for the endpoint's split."
            )
        if self.api not in ("chat", "completions"):
            raise UserError(f"api is {self.api!r}; allowed: chat or completions.")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; allowed: 0 or more.")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise UserError("the API key has characters that no HTTP header can hold; is there a line break in it?")


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise UserError(f"{url!r} is not a URL ({error}); give one like http://127.0.0.1:8000.") from error
    if parts.username is not None or parts.password is not None:
        raise UserError("the URL holds a name or password, which would be shown; use the API key.")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{url!r} is not an HTTP URL; give one like http://127.0.0.1:8000.")
    if parts.query or parts.fragment:
        raise UserError(f"{url!r} has more than a path; give the endpoint's base, like http://127.0.0.1:8000.")
