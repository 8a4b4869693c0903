"""Intervals hold as often as they say."""

import math

import numpy as np
import pytest

from serving.bench.summary import QUANTILES, order_ranks, summarise, summarise_pooled


def test_figures() -> None:
    summary = summarise([float(i) for i in range(101)])
    assert (summary["count"], summary["mean"]) == (101, 50.0)
    assert [summary[name] for name in ("p50", "p90", "p95", "p99")] == [50.0, 90.0, 95.0, 99.0]  # type: ignore[literal-required]
    assert summarise([]) == {} == summarise_pooled([]) == summarise_pooled([(), ()])


def below(n: int, q: float, k: int) -> float:
    """P(B <= k), B binomial, term by term."""
    return sum(math.comb(n, i) * q**i * (1 - q) ** (n - i) for i in range(k + 1))


@pytest.mark.parametrize("n", [1, 5, 59, 100, 299, 1000])
@pytest.mark.parametrize("q", [0.5, 0.95, 0.99])
def test_ranks_are_the_closest_that_are_sure_enough(n: int, q: float) -> None:
    low, high = order_ranks(n, q)
    if low is None:
        assert below(n, q, 0) > 0.025
    else:
        assert below(n, q, low - 1) <= 0.025 < below(n, q, low)
    if high is None:
        assert 1 - below(n, q, n - 1) > 0.025
    else:
        assert 1 - below(n, q, high - 1) <= 0.025 + 1e-12
        assert high == 1 or 1 - below(n, q, high - 2) > 0.025


def test_a_million_draws_are_no_trouble() -> None:
    low, high = order_ranks(1_000_000, 0.99)
    spread = 1.96 * math.sqrt(1e6 * 0.99 * 0.01)
    assert low == pytest.approx(990_000 - spread, abs=3) and high == pytest.approx(990_000 + spread, abs=3)


def test_too_few_values_bound_no_high_quantile() -> None:
    intervals = summarise([float(i) for i in range(1, 101)])["intervals"]
    assert intervals["p99"][1] is None and intervals["p90"][1] is not None
    assert summarise([3.0])["intervals"]["p50"] == (0.0, None)


def test_intervals_cover() -> None:
    rng = np.random.default_rng(5)
    truth = {"mean": 1.0, **{name: -math.log(1 - q) for name, q in QUANTILES.items()}}  # exponential
    missed = dict.fromkeys(truth, 0)
    repetitions = 150
    for i in range(repetitions):
        intervals = summarise(rng.exponential(size=400).tolist(), seed=i)["intervals"]
        for name, value in truth.items():
            low, high = intervals[name]
            missed[name] += not ((low or 0.0) <= value <= (math.inf if high is None else high))
    # 5 % of 150 are 7.5; 17 or more would come up once in a thousand times.
    assert max(missed.values()) < 17, missed


def test_gaps_that_hang_together_have_wide_intervals() -> None:
    rng = np.random.default_rng(6)
    missed = {"pooled": 0, "as if independent": 0}
    for i in range(60):
        # 40 answers, each with its own pace for 50 tokens; the mean over all is 1.
        groups = [np.full(50, pace).tolist() for pace in rng.exponential(size=40)]
        pooled = summarise_pooled(groups, seed=i)["intervals"]["mean"]
        naive = summarise([gap for group in groups for gap in group], seed=i)["intervals"]["mean"]
        for name, (low, high) in {"pooled": pooled, "as if independent": naive}.items():
            assert low is not None and high is not None
            missed[name] += not low <= 1.0 <= high
    assert missed["pooled"] < 10 < 30 < missed["as if independent"]


def test_pooled_figures_are_those_of_all_values() -> None:
    pooled = summarise_pooled([(1.0, 5.0), (), (3.0, 2.0, 4.0)])
    assert (pooled["count"], pooled["mean"], pooled["p50"]) == (5, 3.0, 3.0)
