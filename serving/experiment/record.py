"""What one arm has shown so far: counts, samples, and what the teacher said about its answers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serving.experiment.observation import Observation, Quality
from serving.experiment.sample import STATISTICS, Sample
from serving.experiment.sequences import Interval, Moments, bounded_mean_interval, mean_interval, share_interval
from serving.records import OVERLOADED

# A candidate whose last so many requests all failed while control answered is out at once, whatever the interval says:
# one that fails in four of ten cases does so by chance once in 10^8 such runs. "While control answered" keeps an outage
# of everything from being blamed on the arm that happens to get more requests.
DEAD_AFTER = 20
# What of an arm is a plain value and goes into the snapshot by its name.
_PLAIN = (
    *("state", "requests", "errors", "prompt_tokens", "completion_tokens", "ended"),
    *("failed_in_a_row", "failing_since", "answered_at"),
)
METRICS = ("latency_ms", "first_token_ms", "per_token_ms", "completion_tokens")


@dataclass
class ArmRecord:
    """One arm of an experiment."""

    state: str
    """control, candidate, rolled_back or winner."""
    requests: int = 0
    errors: int = 0
    failed_in_a_row: int = 0
    """The last so many requests all failed; without those that a full queue refused."""
    failing_since: float = 0.0
    """When the middle one of the first DEAD_AFTER of those arrived; 0 before there is one."""
    answered_at: float = 0.0
    """The latest arrival of a request that was answered."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    ended: float | None = None
    """When it was rolled back; its replicas cost nothing after that."""
    samples: dict[str, Sample] = field(default_factory=lambda: {metric: Sample() for metric in METRICS})
    scored: dict[str, list[float]] = field(default_factory=lambda: {"tokens": [], "kl": [], "agreement": []})

    def observe(self, seen: Observation) -> None:
        """Count one request."""
        self.requests += 1
        if seen.error is not None:
            self.errors += 1
            # A full queue refuses in bursts, while the arm answers others: DEAD_AFTER does not count with that.
            if seen.error == OVERLOADED:
                return
            self.failed_in_a_row += 1
            if self.failed_in_a_row == DEAD_AFTER // 2:
                self.failing_since = seen.at
            return
        if seen.latency_ms is None:
            return
        self.failed_in_a_row = 0
        self.answered_at = max(self.answered_at, seen.at)
        self.prompt_tokens += seen.prompt_tokens
        self.completion_tokens += seen.completion_tokens
        for metric, sample in self.samples.items():
            value = getattr(seen, metric)
            if value is not None:
                sample.add(value)

    def score(self, quality: Quality) -> None:
        """Count one scored answer.

        Raises:
            ValueError: a score is no finite number.
        """
        if not (math.isfinite(quality.kl) and math.isfinite(quality.agreement)):
            raise ValueError(f"KL {quality.kl} and agreement {quality.agreement} are no scores")
        self.scored["tokens"].append(quality.tokens)
        self.scored["kl"].append(quality.kl)
        self.scored["agreement"].append(quality.agreement)

    def score_mean(self, what: str) -> float:
        """Mean over the scored answers; 0 without any."""
        return float(np.mean(self.scored[what])) if self.scored[what] else 0.0

    def score_interval(self, what: str, alpha: float) -> Interval:
        """The confidence sequence of :meth:`score_mean`, for ``kl`` or ``agreement``.

        KL has no upper bound, so its interval is the asymptotic one; agreement's holds from the first answer on.
        """
        values = np.array(self.scored[what], dtype=np.float64)
        if what == "agreement":
            return bounded_mean_interval(values, alpha)
        return mean_interval(Moments.of(values), alpha)

    def tokens_per_s(self) -> float | None:
        """What one caller gets: output tokens over the time that their answers took. None before the first answer."""
        spent_ms = sum(self.samples["latency_ms"].values)
        return self.completion_tokens / spent_ms * 1000 if spent_ms else None

    def summary(self, alpha: float, cost: float | None, values: bool) -> dict[str, Any]:
        """The arm's part of the snapshot; every interval misses in at most a share ``alpha``, each by itself."""
        summary: dict[str, Any] = {
            **{name: getattr(self, name) for name in _PLAIN},
            "cost": cost,
            "tokens_per_s": self.tokens_per_s(),
            "metrics": {metric: _metric(sample, alpha) for metric, sample in self.samples.items()},
            "error_rate": {
                "estimate": self.errors / self.requests if self.requests else None,
                "interval": bounds(share_interval(self.errors, self.requests, alpha)),
            },
            "quality": self._quality(alpha),
        }
        if values:
            summary["values"] = {metric: list(sample.values) for metric, sample in self.samples.items()}
            summary["scored"] = {what: list(scores) for what, scores in self.scored.items()}
        return summary

    @classmethod
    def restored(cls, summary: Mapping[str, Any]) -> "ArmRecord":
        """The arm of a :meth:`summary` with values."""
        record = cls(**{name: summary[name] for name in _PLAIN})
        record.samples = {metric: Sample(values) for metric, values in summary["values"].items()}
        record.scored = {what: list(scores) for what, scores in summary["scored"].items()}
        return record

    def _quality(self, alpha: float) -> dict[str, Any] | None:
        if not self.scored["kl"]:
            return None
        return {
            "answers": len(self.scored["kl"]),
            "tokens": int(sum(self.scored["tokens"])),
            "kl": self.score_mean("kl"),
            "kl_interval": bounds(self.score_interval("kl", alpha)),
            "agreement": self.score_mean("agreement"),
            "agreement_interval": bounds(self.score_interval("agreement", alpha)),
        }


def bounds(interval: Interval) -> list[float | None]:
    """An interval for JSON, which knows no infinity: an open end is None."""
    return [end if np.isfinite(end) else None for end in interval]


def _metric(sample: Sample, alpha: float) -> dict[str, Any]:
    return {
        "count": len(sample),
        **{statistic: sample.estimate(statistic) for statistic in STATISTICS},
        "intervals": {statistic: bounds(sample.interval(statistic, alpha)) for statistic in STATISTICS},
    }
