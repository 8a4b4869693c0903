"""What is kept of one request."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Sample:
    """One request as its client saw it.

    Times are in ms from the moment the request was *due*: its intended arrival in an open loop, its sending in a
    closed one. So a request that could not be sent in time, for whatever reason, shows it in its own times.
    """

    arm: str
    """Who answered: the ``x-stillhouse-arm`` header, else the model that was asked for."""

    at: float = 0.0
    """When it was due, in seconds since the run's start."""

    late_ms: float = 0.0
    """How long after that it was really sent; the generator's own delay."""

    first_token_ms: float | None = None
    """To the first text; None when it failed before one."""

    latency_ms: float | None = None
    """To the end of the answer; None when it failed."""

    prompt_tokens: int = 0
    """The server's count; 0 when it gave none."""

    completion_tokens: int = 0
    """The server's count; the number of events with text when it gave none, see ``counted``."""

    counted: bool = True
    """Whether the tokens are the server's count."""

    gaps_ms: tuple[float, ...] = ()
    """Between one event with text and the next; 0 where both came in one piece from the network."""

    error: str | None = None
    """What kind of failure, see :mod:`serving.bench.client`; None for an answer."""

    detail: str = ""
    """The failure in words."""

    @property
    def per_token_ms(self) -> float | None:
        """Time per output token behind the first; None for a failure or fewer than two tokens."""
        if self.latency_ms is None or self.first_token_ms is None or self.completion_tokens < 2:
            return None
        return (self.latency_ms - self.first_token_ms) / (self.completion_tokens - 1)

    def as_dict(self, started: float) -> dict[str, Any]:
        """JSON-able, times rounded to 1e-3 ms; ``at`` becomes seconds since 1970, the run having begun at ``started``.

        The names are those of an observation of the ingress, and a file of such lines can be replayed as a trace.
        """
        row: dict[str, Any] = {"arm": self.arm, "at": round(started + self.at, 6)}
        row["prompt_tokens"], row["completion_tokens"] = self.prompt_tokens, self.completion_tokens
        for name in ("first_token_ms", "latency_ms", "per_token_ms", "late_ms"):
            value = getattr(self, name)
            row[name] = None if value is None else round(value, 3)
        row["gaps_ms"] = [round(gap, 3) for gap in self.gaps_ms]
        return {**row, "error": self.error, "detail": self.detail}
