"""What an experiment's statistics are worth on latencies that a real endpoint took.

Every repetition is an experiment on requests drawn, with repetition, from the recorded latencies, so what is true is
known: A/A has arms of the same distribution, in A/B the candidate takes 0.9 times as long.

- A/A: how often does anything get promoted or rolled back, when it is looked at after every few requests? At most 5 %
  may be. The asked gain is 0 and so is the allowed slowness, the hardest case: any difference at all is acted on.
- A/B: how often is the candidate promoted, and after how many requests?
- Coverage: how often does an interval hold the true value at *all* looks? Beside it the intervals of the textbook,
  which are made for one look.
- The usual practice, Welch's t-test at each look until it says p < 0.05, on requests drawn from the same latencies.

``python benchmarks/experiment.py``; some five minutes on one core.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from common import arguments, write

from serving.experiment import Decision, Experiment, ExperimentSpec, Observation
from serving.experiment.sequences import (
    Floats,
    Moments,
    bounded_mean_interval,
    mean_interval,
    mean_ratio,
    quantile_interval,
    quantile_ratio,
    share_difference,
    share_interval,
)

LATENCIES = Path(__file__).parent / "data" / "latencies.json"
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
ALPHA, Z = 0.05, 1.959964
GAP = 0.1
# A/A: requests over all arms of one repetition, and between two looks.
AA_REQUESTS, AA_EVERY = 4000, 20
AB_REQUESTS, AB_EVERY = 20000, 100
# Coverage: values per arm, and between two looks.
COVER_VALUES, COVER_EVERY = 4000, 20
AA_CASES = (("p50", 1), ("mean", 1), ("p95", 1), ("p50", 3))
AB_CASES = (("p50", 0.0), ("p50", 0.03), ("p50", 0.05), ("mean", 0.0), ("p95", 0.0), ("p99", 0.0))


class Bare(Experiment):
    """An experiment without its timeline, which decides nothing and takes most of a look's time."""

    def _entry(self, now: float) -> dict[str, Any]:
        return {"at": now}


def recorded(path: Path) -> tuple[Floats, Any]:
    """The recorded latencies (ms, sorted) and what they were recorded on."""
    if not path.is_file():
        raise SystemExit(f'{path} is not there; record some: {{"environment": {{...}}, "latency_ms": [...]}}')
    content = json.loads(path.read_text())
    return np.sort(np.round(np.array(content["latency_ms"], dtype=np.float64), 3)), content["environment"]


def run_once(
    spec: ExperimentSpec, latencies: Floats, scale: dict[str, float], every: int, rng: np.random.Generator
) -> tuple[Decision, int]:
    """The first decision of one experiment whose requests are dealt to its arms by lot, and after how many it fell."""
    experiment, arms, requests = Bare(spec, 0.0), spec.arms, 0
    while True:
        drawn = zip(rng.integers(len(arms), size=every), rng.choice(latencies, every), strict=True)
        experiment.observe(
            Observation(arms[arm], requests / 10, latency_ms=float(latency) * scale.get(arms[arm], 1.0))
            for arm, latency in drawn
        )
        requests += every
        if decision := experiment.check(requests / 10):
            return decision, requests


def aa(latencies: Floats, repetitions: int, seed: int, statistic: str, candidates: int) -> dict[str, Any]:
    """False alarms among experiments on arms that do not differ."""
    spec = ExperimentSpec.model_validate(
        {
            "name": "aa",
            "control": "a",
            "candidates": [f"b{i}" for i in range(candidates)],
            "statistic": statistic,
            "gain": 0.0,
            "guards": {"slower": 0.0},
            "max_requests": AA_REQUESTS,
        }
    )
    rngs = [np.random.default_rng([seed, i]) for i in range(repetitions)]
    outcomes = [run_once(spec, latencies, {}, AA_EVERY, rng)[0].outcome for rng in rngs]
    alarms = sum(outcome != "no_winner" for outcome in outcomes)
    return {"statistic": statistic, "candidates": candidates, "alarms": alarms, "rate": alarms / repetitions}


def ab(latencies: Floats, repetitions: int, seed: int, statistic: str, gain: float) -> dict[str, Any]:
    """How often and how soon a candidate that is faster by GAP is promoted."""
    spec = ExperimentSpec.model_validate(
        {
            "name": "ab",
            "control": "a",
            "candidates": ["b"],
            "statistic": statistic,
            "gain": gain,
            "max_requests": AB_REQUESTS,
        }
    )
    rngs = [np.random.default_rng([seed, i]) for i in range(repetitions)]
    runs = [run_once(spec, latencies, {"b": 1 - GAP}, AB_EVERY, rng) for rng in rngs]
    needed = np.array([requests if decision.outcome == "promote" else np.inf for decision, requests in runs])
    median, most = (float(np.quantile(needed, share, method="higher")) for share in (0.5, 0.9))
    return {
        "statistic": statistic,
        "gain": gain,
        "detected": float(np.isfinite(needed).mean()),
        "requests_median": median if math.isfinite(median) else None,
        "requests_90": most if math.isfinite(most) else None,
    }


def welch_alarms(latencies: Floats, repetitions: int, seed: int, scale: float) -> float:
    """Share of repetitions in which Welch's t-test says p < 0.05 at one look or another.

    The same number of requests and looks as :func:`aa`, from 100 per arm on. The t quantile by its expansion
    around the normal one (Abramowitz and Stegun 26.7.5), exact to 1e-4 here.
    """
    alarms = 0
    counts = np.arange(100, AA_REQUESTS // 2 + 1, AA_EVERY // 2)
    for i in range(repetitions):
        rng = np.random.default_rng([seed, i])
        mean1, error1 = _running(rng.choice(latencies, AA_REQUESTS // 2), counts)
        mean2, error2 = _running(rng.choice(latencies, AA_REQUESTS // 2) * scale, counts)
        freedom = (error1 + error2) ** 2 / (error1**2 + error2**2) * (counts - 1)
        limit = Z + (Z**3 + Z) / (4 * freedom)
        alarms += bool(np.any(np.abs(mean1 - mean2) > limit * np.sqrt(error1 + error2)))
    return alarms / repetitions


def _running(values: Floats, counts: Any) -> tuple[Floats, Floats]:
    """Means of the first so many values, and the squared standard errors of them."""
    mean = np.cumsum(values)[counts - 1] / counts
    square = np.cumsum(values**2)[counts - 1] / counts
    return mean, (square - mean**2) / (counts - 1)


class Cover:
    """Counts for each kind of interval in how many repetitions it missed at any look."""

    def __init__(self) -> None:
        self.missed: dict[str, set[int]] = {}
        self.widths: dict[str, list[float]] = {}

    def see(self, name: str, repetition: int, interval: tuple[float, float], truth: float, width: bool = False) -> None:
        """One interval at one look; ``width`` for those whose width goes into the table."""
        missed = self.missed.setdefault(name, set())
        if not interval[0] <= truth <= interval[1]:
            missed.add(repetition)
        if width:
            self.widths.setdefault(name, []).append((interval[1] - interval[0]) / 2)

    def table(self, repetitions: int) -> dict[str, dict[str, float]]:
        """Per kind: coverage over all looks, and the median half width at the last one."""
        return {
            name: {"coverage": 1 - len(missed) / repetitions, "half_width": float(np.median(self.widths[name]))}
            for name, missed in self.missed.items()
        }


def coverage(latencies: Floats, repetitions: int, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Coverage at all looks of the confidence sequences and of the textbook's intervals, each alone at 95 %."""
    ours, textbook = Cover(), Cover()
    truths = {name: float(latencies[math.ceil(p * len(latencies)) - 1]) for name, p in QUANTILES.items()}
    for i in range(repetitions):
        rng = np.random.default_rng([seed, i])
        a, b = rng.choice(latencies, COVER_VALUES), rng.choice(latencies, COVER_VALUES)
        for count in range(COVER_EVERY, COVER_VALUES + 1, COVER_EVERY):
            last = count == COVER_VALUES
            one, two = np.sort(a[:count]), np.sort(b[:count])
            for name, p in QUANTILES.items():
                ours.see(name, i, quantile_interval(one, p, ALPHA), truths[name], last)
                ours.see(f"{name} ratio", i, quantile_ratio(two, one, p, ALPHA), 1.0, last)
                textbook.see(name, i, _textbook_quantile(one, p), truths[name], last)
            first, second = Moments.of(one), Moments.of(two)
            ours.see("mean", i, mean_interval(first, ALPHA), float(latencies.mean()), last)
            ours.see("mean ratio", i, mean_ratio(second, first, ALPHA), 1.0, last)
            half = Z * math.sqrt(first.variance / count)
            textbook.see("mean", i, (first.mean - half, first.mean + half), float(latencies.mean()), last)
        _cover_shares(ours, i, rng)
    return {"sequences": ours.table(repetitions), "textbook": textbook.table(repetitions)}


def _cover_shares(cover: Cover, repetition: int, rng: np.random.Generator) -> None:
    """Errors at a rate of 1 % in both arms, and an agreement of 0.6 that differs from answer to answer."""
    one, two = np.cumsum(rng.random(COVER_VALUES) < 0.01), np.cumsum(rng.random(COVER_VALUES) < 0.01)
    agreement = rng.beta(6, 4, COVER_VALUES)
    for count in range(100, COVER_VALUES + 1, 100):
        last, hits1, hits2 = count == COVER_VALUES, int(one[count - 1]), int(two[count - 1])
        cover.see("error rate", repetition, share_interval(hits1, count, ALPHA), 0.01, last)
        difference = share_difference(hits1, count, hits2, count, ALPHA)
        cover.see("error rate difference", repetition, difference, 0.0, last)
        cover.see("agreement", repetition, bounded_mean_interval(agreement[:count], ALPHA), 0.6, last)


def _textbook_quantile(sample: Floats, p: float) -> tuple[float, float]:
    """Between order statistics, their ranks by the normal approximation of the binomial distribution."""
    count, reach = len(sample), Z * math.sqrt(len(sample) * p * (1 - p))
    low, high = math.floor(count * p - reach), math.ceil(count * p + reach) + 1
    return (float(sample[low - 1]) if low >= 1 else 0.0), (float(sample[high - 1]) if high <= count else math.inf)


def _table(head: str, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print each row when it is there: some take a minute."""
    print(f"\n{head}", flush=True)
    kept = []
    for row in rows:
        cells = (
            f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
        )
        print("  " + ", ".join(cells), flush=True)
        kept.append(row)
    return kept


def main() -> None:
    """Measure, print, write."""
    parser = arguments(str(__doc__).splitlines()[0], threads=False)
    parser.add_argument("--latencies", type=Path, default=LATENCIES, help="JSON file with environment and latency_ms")
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=6)
    chosen = parser.parse_args()
    latencies, environment = recorded(chosen.latencies)
    repetitions, seed = chosen.repetitions, chosen.seed
    spread = {name: round(float(np.quantile(latencies, p)), 1) for name, p in QUANTILES.items()}
    print(f"{len(latencies)} recorded latencies, ms: mean {latencies.mean():.1f}, {spread}; {repetitions} repetitions")
    figures: dict[str, Any] = {"latencies": {"environment": environment, **spread}, "repetitions": repetitions}

    figures["aa"] = _table(
        f"A/A, {AA_REQUESTS} requests, a look every {AA_EVERY}: false alarms",
        (aa(latencies, repetitions, seed, *case) for case in AA_CASES),
    )
    figures["welch"] = _table(
        f"Welch's t-test at each look (as many requests and looks, from 100 per arm on): p < {ALPHA}",
        ({"gap": gap, "rate": welch_alarms(latencies, repetitions, seed, 1 - gap)} for gap in (0.0, GAP)),
    )
    figures["ab"] = _table(
        f"A/B, {GAP:.0%} faster, at most {AB_REQUESTS} requests, a look every {AB_EVERY}: promotions",
        (ab(latencies, repetitions, seed, *case) for case in AB_CASES),
    )
    covered = coverage(latencies, repetitions, seed)
    textbook = {name: row["coverage"] for name, row in covered["textbook"].items()}
    figures["coverage"] = _table(
        f"Coverage at all looks, nominal 95 %, to {COVER_VALUES} values per arm; half width there (ms, or absolute)",
        ({"of": name, **row, "textbook": textbook.get(name)} for name, row in covered["sequences"].items()),
    )
    write(chosen.out, "experiment", figures)


if __name__ == "__main__":
    main()
