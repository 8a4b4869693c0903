"""What a run showed: figures per arm, what went wrong, and whether the generator itself kept pace."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import RunError
from serving.bench.sample import Sample
from serving.bench.settings import Settings
from serving.bench.summary import Summary, summarise, summarise_pooled

METRICS = ("first_token_ms", "per_token_ms", "gaps_ms", "latency_ms")
_ROW_QUANTILES = ("p50", "p95", "p99")
_MOST_ERRORS = 20
# From here on the generator's own delay is a part of the figures that one must know of.
_SHARE_OF_FIRST_TOKEN = 0.1
_LEAST_DELAY_MS = 2.0


@dataclass(frozen=True)
class ArmResult:
    """What one arm showed. ``count`` answers and ``errors`` failures; all figures are over the answers.

    ``per_token_ms`` is the time per output token behind the first of each answer (whole latency less the time to
    the first token, over the tokens less one), ``gaps_ms`` the time from each event with text to the next one.
    ``tokens_per_s`` is what one client sees, output tokens over the time its requests took;
    ``total_tokens_per_s`` and ``requests_per_s`` are the arm's answers over the run's duration.
    """

    arm: str
    count: int
    errors: int
    first_token_ms: Summary
    per_token_ms: Summary
    gaps_ms: Summary
    latency_ms: Summary
    prompt_tokens: Summary
    completion_tokens: Summary
    tokens_per_s: float
    total_tokens_per_s: float
    requests_per_s: float
    error_kinds: dict[str, int] = field(default_factory=dict)
    """Kind of failure, see :mod:`serving.bench.client` -> how often."""


@dataclass(frozen=True)
class Pace:
    """Whether requests went out when they should, and the event loop was there when bytes came in.

    ``asked_per_s`` is None in a closed loop, where the server sets the pace. ``late_ms`` is how long after the intended
    arrival requests were sent; ``loop_lag_ms`` how much too late the generator's event loop woke up from short naps.
    Both are parts of the times in the result.
    """

    asked_per_s: float | None
    answered_per_s: float
    late_ms: Summary
    loop_lag_ms: Summary
    kept: bool


@dataclass(frozen=True)
class BenchResult:
    """A whole run. ``seconds`` is its duration without the warm-up, ``tokens_per_s`` all output over it."""

    settings: Settings
    started: float
    """Seconds since 1970."""

    seconds: float
    tokens_per_s: float
    arms: list[ArmResult]
    pace: Pace
    errors: dict[str, int] = field(default_factory=dict)
    """The most frequent failures in words ("arm: what") -> how often."""

    warnings: list[str] = field(default_factory=list)
    """What one must know to read the figures."""

    samples: list[Sample] = field(default_factory=list, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, the same names, without the samples; an arm that never answered has empty summaries."""
        row = {**vars(self), "settings": self.settings.as_dict(), "pace": vars(self.pace)}
        del row["samples"]
        return {"url": self.settings.url, **row, "arms": [vars(arm) for arm in self.arms]}

    def rows(self) -> list[dict[str, Any]]:
        """For the family's report, a row per arm: name, count, errors, tokens/s, and p50, p95 and p99 of two times."""

        def few(summary: Mapping[str, Any]) -> dict[str, float]:
            return {name: summary[name] for name in _ROW_QUANTILES if name in summary}

        return [
            {
                **{name: getattr(arm, name) for name in ("arm", "count", "errors", "tokens_per_s")},
                "first_token_ms": few(arm.first_token_ms),
                "latency_ms": few(arm.latency_ms),
            }
            for arm in self.arms
        ]

    def write_samples(self, path: Path) -> None:
        """Write every request to a JSONL file, see :meth:`Sample.as_dict`; it appears whole or not at all.

        Raises:
            RunError: it cannot be written.
        """
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with aside.open("w", encoding="utf-8") as file:
                for sample in self.samples:
                    file.write(json.dumps(sample.as_dict(self.started), ensure_ascii=False) + "\n")
            aside.replace(path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise RunError(f"the samples could not be written to {path}: {error.strerror}.") from error


def summarise_run(
    settings: Settings, samples: Sequence[Sample], seconds: float, started: float, lags_ms: Sequence[float] = ()
) -> BenchResult:
    """The result of a run of ``seconds``.

    Raises:
        RunError: not one sample is an answer.
    """
    errors = Counter(f"{sample.arm}: {sample.detail or sample.error}" for sample in samples if sample.error)
    if errors.total() == len(samples):
        what, count = errors.most_common(1)[0] if errors else ("no request was due", 0)
        raise RunError(f"none of {len(samples)} requests to {settings.url} was answered; {count} times {what}.")
    names = sorted({sample.arm for sample in samples})
    arms = [_arm(name, [s for s in samples if s.arm == name], seconds, settings.seed) for name in names]
    pace = _pace(settings, samples, seconds, lags_ms)
    return BenchResult(
        settings=settings,
        started=started,
        seconds=seconds,
        tokens_per_s=sum(sample.completion_tokens for sample in samples if not sample.error) / seconds,
        arms=arms,
        pace=pace,
        errors=dict(errors.most_common(_MOST_ERRORS)),
        warnings=_warnings(settings, samples, pace),
        samples=list(samples),
    )


def _arm(name: str, samples: Sequence[Sample], seconds: float, seed: int) -> ArmResult:
    answers = [sample for sample in samples if not sample.error]
    tokens = sum(sample.completion_tokens for sample in answers)
    spent_s = sum(sample.latency_ms or 0.0 for sample in answers) / 1000

    def over(metric: str) -> Summary:
        return summarise([value for sample in answers if (value := getattr(sample, metric)) is not None], seed)

    return ArmResult(
        arm=name,
        count=len(answers),
        errors=len(samples) - len(answers),
        first_token_ms=over("first_token_ms"),
        per_token_ms=over("per_token_ms"),
        gaps_ms=summarise_pooled([sample.gaps_ms for sample in answers], seed),
        latency_ms=over("latency_ms"),
        prompt_tokens=over("prompt_tokens"),
        completion_tokens=over("completion_tokens"),
        tokens_per_s=tokens / spent_s if spent_s else 0.0,
        total_tokens_per_s=tokens / seconds,
        requests_per_s=len(answers) / seconds,
        error_kinds=dict(Counter(sample.error for sample in samples if sample.error).most_common()),
    )


def _pace(settings: Settings, samples: Sequence[Sample], seconds: float, lags_ms: Sequence[float]) -> Pace:
    asked: float | None = settings.rate
    if settings.trace is not None:
        span = max(sample.at for sample in samples)
        asked = len(samples) / span if span else None
    late = summarise([sample.late_ms for sample in samples], settings.seed) if settings.open_loop else Summary()
    lag = summarise(lags_ms, settings.seed)
    firsts = sorted(sample.first_token_ms for sample in samples if sample.first_token_ms is not None)
    allowed = max(_LEAST_DELAY_MS, _SHARE_OF_FIRST_TOKEN * firsts[len(firsts) // 2])
    kept = late.get("p99", 0.0) <= allowed and lag.get("p99", 0.0) <= allowed
    answered = sum(sample.error is None for sample in samples) / seconds
    return Pace(asked, answered, late, lag, kept)


def _warnings(settings: Settings, samples: Sequence[Sample], pace: Pace) -> list[str]:
    said = []
    if not pace.kept:
        late = f"requests were sent up to {pace.late_ms['p99']:.3g} ms late (p99), " if pace.late_ms else ""
        said.append(
            f"the generator did not keep pace: {late}its event loop was {pace.loop_lag_ms.get('p99', 0.0):.3g} ms late "
            "(p99), and that is in the times above; run it on another machine, or ask for less"
        )
    kinds = Counter(sample.error for sample in samples)
    if slow := kinds["timeout"]:
        said.append(
            f"{slow} requests took over {settings.timeout_s:g} s and are in no quantile; the true ones are higher"
        )
    if full := kinds["generator"]:
        said.append(f"{full} requests could not be sent, for this process had no file descriptor left; raise ulimit -n")
    if any(not sample.error and not sample.counted for sample in samples):
        said.append("some answers came without usage; their tokens are counted as events with text")
    if any(not sample.error and sample.completion_tokens == 0 for sample in samples):
        said.append("some answers were empty")
    return said
