"""Snapshots of experiments as the report gets them, made without an experiment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

STARTED = 1_790_000_000.0
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
TIMES = ("latency_ms", "first_token_ms", "per_token_ms")
OUTCOMES = {
    "promote": "Promoted: the median is at least 5 % lower with 95 % confidence, and no guard is broken.",
    "rollback": "Rolled back: the error rate is surely more than 2 points above the control's.",
    "no_winner": "Stopped without a winner after 20000 requests: the interval still holds 5 %.",
    "stopped": "Stopped by hand.",
}


def band(values: np.ndarray, statistic: str) -> list[float | None]:
    """An estimate with an interval that narrows as values come, unbounded where there are too few."""
    if not len(values):
        return [None, None, None]
    wide = 1.6 / math.sqrt(len(values))
    if statistic == "mean":
        mean, error = float(values.mean()), 4 * float(values.std()) / math.sqrt(len(values))
        return [mean, max(mean - error, 0.0), mean + error if len(values) > 5 else None]
    share = QUANTILES[statistic]
    wide *= math.sqrt(share * (1 - share)) + 0.1 / math.sqrt(len(values))
    low, high = share - wide, share + wide
    return [
        float(np.quantile(values, share)),
        float(np.quantile(values, low)) if low > 0 else 0.0,
        float(np.quantile(values, high)) if high < 1 else None,
    ]


def gain(candidate: Sequence[float | None], control: Sequence[float | None]) -> dict[str, Any]:
    def ratio(above: float | None, below: float | None) -> float | None:
        return None if above is None or not below else 1 - above / below

    return {
        "gain": ratio(candidate[0], control[0]),
        "interval": [ratio(candidate[2], control[1]), ratio(candidate[1], control[2])],
    }


def _times(generator: np.random.Generator, count: int, factor: float) -> dict[str, np.ndarray]:
    tokens = generator.integers(20, 60, count)
    first = factor * generator.lognormal(3.4, 0.35, count)
    each = factor * generator.lognormal(1.6, 0.15, count)
    # A few answers met a full queue.
    first = np.where(generator.random(count) < 0.03, first * generator.uniform(4, 14, count), first)
    latency = first + each * (tokens - 1)
    return {"latency_ms": latency, "first_token_ms": first, "per_token_ms": each, "completion_tokens": tokens}


def _arm(
    values: dict[str, np.ndarray], state: str, errors: int, cost: float | None, kl: float | None
) -> dict[str, Any]:
    count = len(values["latency_ms"])
    metrics = {}
    for name, column in values.items():
        bands = {statistic: band(column, statistic) for statistic in ("mean", *QUANTILES)}
        metrics[name] = {"count": count, **{statistic: found[0] for statistic, found in bands.items()}}
        metrics[name]["intervals"] = {statistic: found[1:] for statistic, found in bands.items()}
    asked = count + errors
    quality = None
    if kl is not None:
        quality = {"answers": 210, "tokens": 8400, "kl": kl, "kl_interval": [kl - 0.03, kl + 0.035]}
        quality |= {"agreement": 0.93 - kl, "agreement_interval": [0.9 - kl, 0.95 - kl]}
    return {
        "requests": asked,
        "errors": errors,
        "prompt_tokens": 31 * asked,
        "completion_tokens": int(values["completion_tokens"].sum()),
        "cost": cost,
        "tokens_per_s": 182.5 if count else None,
        "state": state,
        "metrics": metrics,
        "error_rate": {
            "estimate": errors / asked if asked else None,
            "interval": [0.0, min(errors / 500 + 0.006, 1.0)],
        },
        "quality": quality,
        "values": {name: np.round(values[name], 3).tolist() for name in TIMES},
    }


def snapshot(
    candidates: Sequence[str] = ("student-s",),
    control: str = "champion",
    requests: int = 1500,
    outcome: str | None = "promote",
    quality: bool = True,
    cost: bool = True,
    silent: Sequence[str] = (),
    statistic: str = "p50",
) -> dict[str, Any]:
    """A snapshot with values.

    Args:
        requests: answers per arm; 0 for an experiment that has seen nothing.
        outcome: how it ended (the first candidate is the one it is about); None while it runs.
        silent: arms that gave nothing but errors.
    """
    generator = np.random.default_rng(7)
    arms = [control, *candidates]
    factors = dict(zip(arms, (1.0, 0.84, 0.97, 1.1, 0.7, 0.9), strict=False))
    counts = {arm: 0 if arm in silent else requests for arm in arms}
    values = {arm: _times(generator, counts[arm], factors[arm]) for arm in arms}
    states = {arm: "control" if arm == control else "candidate" for arm in arms}
    if outcome in ("promote", "rollback"):
        states[candidates[0]] = "winner" if outcome == "promote" else "rolled_back"
    lasted = 1500.0
    timeline, traffic = [], []
    for share in np.linspace(1 / 60, 1, 60) if requests else ():
        seen = {arm: values[arm]["latency_ms"][: int(share * counts[arm])] for arm in arms}
        bands = {arm: {name: band(seen[arm], name) for name in ("mean", *QUANTILES)} for arm in arms}
        timeline.append(
            {
                "at": STARTED + lasted * float(share),
                "arms": {arm: {"requests": len(seen[arm]), **bands[arm]} for arm in arms},
                "comparisons": {arm: gain(bands[arm][statistic], bands[control][statistic]) for arm in candidates},
            }
        )
    for bucket in range(150 if requests else 0):
        tilt = {arm: 1.0 + (0.5 * (arm != control) if bucket > 60 else 0) for arm in arms}
        sent = {arm: int(generator.poisson(tilt[arm] * requests / 150)) for arm in arms}
        traffic.append({"at": STARTED + 10.0 * bucket, "requests": sent})
    events = [{"at": STARTED, "what": "started", "text": "The experiment started.", "evidence": {}}]
    if requests:
        weights = {arm: 1.5 if arm != control else 1.0 for arm in arms}
        text = "The traffic was set to new weights."
        events.append({"at": STARTED + 600, "what": "weights", "text": text, "evidence": {"weights": weights}})
    compared = {
        arm: gain(band(values[arm]["latency_ms"], statistic), band(values[control]["latency_ms"], statistic))
        for arm in candidates
    }
    if outcome:
        arm = candidates[0] if outcome in ("promote", "rollback") else None
        evidence = {"outcome": outcome, "arm": arm, statistic: compared[candidates[0]]}
        events.append({"at": STARTED + lasted, "what": "decision", "text": OUTCOMES[outcome], "evidence": evidence})
    kls = dict(zip(arms, (0.11, 0.14, 0.22, 0.09, 0.3, 0.2), strict=False))
    return {
        "spec": {
            "name": "students of 2026-10",
            "control": control,
            "candidates": list(candidates),
            "metric": "latency_ms",
            "statistic": statistic,
            "gain": 0.05,
            "confidence": 0.95,
            "min_requests": 100,
            "max_requests": 20000,
            "sample": 0.05 if quality else 0.0,
            "guards": {"error_rate": 0.02, "kl": 0.25 if quality else None, "agreement": None, "slower": None},
            "teacher": "models:/teacher/3" if quality else None,
            "promote_alias": "champion",
        },
        "started": STARTED,
        "ended": STARTED + lasted if outcome else None,
        "environment": {"stillhouse": "0.1.0", "python": "3.11.9", "cpu": "2 cores", "engine": "transformers 5.17.0"},
        "arms": {
            arm: _arm(
                values[arm],
                states[arm],
                40 if arm in silent else 2 * (requests > 0),
                0.21 if cost else None,
                kls[arm] if quality and counts[arm] else None,
            )
            for arm in arms
        },
        "comparisons": {arm: {statistic: compared[arm]} for arm in candidates},
        "timeline": timeline,
        "traffic": traffic,
        "events": events,
    }
