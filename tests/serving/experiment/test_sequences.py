"""Confidence sequences: martingales are martingales, ends are where they must be, and all holds at all looks."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serving.experiment import sequences
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

ALPHA = 0.05
PS = st.sampled_from([0.5, 0.95, 0.99])
SAMPLES = st.lists(st.integers(1, 50), min_size=1, max_size=200).map(lambda each: np.sort(np.array(each, dtype=float)))


def latencies(rng: np.random.Generator, count: int) -> Floats:
    """Skewed as a server's: most around 200 ms, one in fifty three times as slow."""
    return rng.lognormal(math.log(200), 0.3, count) * np.where(rng.random(count) < 0.02, 3, 1)


def binomial(count: int, p: float) -> Floats:
    k = np.arange(count + 1)
    logs = [math.lgamma(count + 1) - math.lgamma(i + 1) - math.lgamma(count - i + 1) for i in k]
    return np.exp(np.array(logs) + k * math.log(p) + (count - k) * math.log1p(-p))


@pytest.mark.parametrize("count", [1, 7, 60])
@pytest.mark.parametrize("p", [0.5, 0.95, 0.99])
def test_a_quantiles_evidence_is_one_on_average(count: int, p: float) -> None:
    """What Ville's inequality needs: at the true quantile the mixture is a martingale that starts at 1."""
    first, evidence = sequences._log_evidence(count, p, ALPHA)
    assert (first, len(evidence)) == (0, count + 1)
    assert binomial(count, p) @ np.exp(evidence) == pytest.approx(1.0)


@pytest.mark.parametrize("q", [0.01, 0.3, 0.9])
def test_a_shares_evidence_is_one_on_average(q: float) -> None:
    evidence = np.array([sequences._share_evidence(q, hits, 40) for hits in range(41)])
    assert binomial(40, q) @ np.exp(evidence) == pytest.approx(1.0)


@pytest.mark.parametrize("p", [0.5, 0.95, 0.99])
def test_ranks_that_are_not_looked_at_are_ruled_out(p: float) -> None:
    first, evidence = sequences._log_evidence(20_000, p, 1e-6)
    ends = [evidence[0]] if first else []
    if first + len(evidence) <= 20_000:
        ends.append(evidence[-1])
    assert ends
    assert min(ends) > -2 * math.log(1e-6)


@given(SAMPLES, PS)
def test_a_quantiles_interval_holds_the_samples_own(sample: Floats, p: float) -> None:
    low, high = quantile_interval(sample, p, ALPHA)
    assert low <= np.quantile(sample, p) <= high


def pairs_not_ruled_out(numerator: Floats, denominator: Floats, p: float) -> list[tuple[float, float]]:
    """By trying all pairs of ranks: the least and the largest ratio that each allows."""
    found = []
    samples = [np.concatenate(([0.0], sample, [math.inf])) for sample in (numerator, denominator)]
    evidences = [sequences._log_evidence(len(sample), p, ALPHA) for sample in (numerator, denominator)]
    for i, above in enumerate(evidences[0][1], evidences[0][0]):
        for j, below in enumerate(evidences[1][1], evidences[1][0]):
            if above + below < -math.log(ALPHA):
                least = samples[0][i] / samples[1][j + 1]
                most = samples[0][i + 1] / samples[1][j] if samples[1][j] else math.inf
                found.append((float(least), float(most)))
    return found


@given(SAMPLES, SAMPLES, PS)
def test_a_ratio_of_quantiles_is_what_some_pair_of_ranks_allows(one: Floats, two: Floats, p: float) -> None:
    found = pairs_not_ruled_out(one, two, p)
    expected = (min(least for least, _ in found), max(most for _, most in found))
    assert quantile_ratio(one, two, p, ALPHA) == pytest.approx(expected)


@given(SAMPLES, SAMPLES, PS)
def test_a_ratio_turned_round_is_the_inverse(one: Floats, two: Floats, p: float) -> None:
    low, high = quantile_ratio(one, two, p, ALPHA)
    back_low, back_high = quantile_ratio(two, one, p, ALPHA)
    assert back_low == pytest.approx(1 / high)
    assert back_high == pytest.approx(1 / low if low else math.inf)


def test_a_ratio_is_narrower_than_two_intervals_divided() -> None:
    rng = np.random.default_rng(1)
    one, two = np.sort(latencies(rng, 1000)), np.sort(latencies(rng, 1000))
    low, high = quantile_ratio(one, two, 0.5, ALPHA)
    (low1, high1), (low2, high2) = (quantile_interval(sample, 0.5, ALPHA / 2) for sample in (one, two))
    assert high - low < 0.8 * (high1 / low2 - low1 / high2)


def test_empty_samples_say_nothing() -> None:
    none, some = np.empty(0), np.arange(1.0, 100.0)
    assert quantile_interval(none, 0.5, ALPHA) == (0.0, math.inf)
    assert quantile_ratio(none, some, 0.5, ALPHA) == (0.0, math.inf)
    assert mean_interval(Moments.of(none), ALPHA) == (0.0, math.inf)
    assert mean_ratio(Moments.of(none), Moments.of(some), ALPHA) == (0.0, math.inf)
    assert share_interval(0, 0, ALPHA) == (0.0, 1.0)
    assert bounded_mean_interval(none, ALPHA) == (0.0, 1.0)


def test_zeros_bound_no_ratio() -> None:
    assert quantile_ratio(np.zeros(200), np.zeros(200), 0.5, ALPHA) == (0.0, math.inf)


def test_intervals_shrink_as_values_come() -> None:
    values = latencies(np.random.default_rng(2), 16_000)
    kinds: list[Callable[[Floats], tuple[float, float]]] = [
        lambda sample: quantile_interval(np.sort(sample), 0.5, ALPHA),
        lambda sample: quantile_interval(np.sort(sample), 0.99, ALPHA),
        lambda sample: mean_interval(Moments.of(sample), ALPHA),
        lambda sample: bounded_mean_interval(np.minimum(sample / 2000, 1.0), ALPHA),
        lambda sample: share_interval(int((sample > 400).sum()), len(sample), ALPHA),
    ]
    for kind in kinds:
        (low, high), (later_low, later_high) = kind(values[:1000]), kind(values)
        assert 0.1 * (high - low) < later_high - later_low < 0.6 * (high - low)


def test_a_mean_without_skew_is_the_published_formula() -> None:
    values = np.tile([80.0, 120.0], 500)
    low, high = mean_interval(Moments.of(values), ALPHA)
    rho2 = (-2 * math.log(ALPHA) + math.log(-2 * math.log(ALPHA)) + 1) / 1000
    t = 1000 * rho2
    half = 20 * math.sqrt((t + 1) / (1000**2 * rho2) * math.log((t + 1) / ALPHA**2))
    assert (low, high) == pytest.approx((100 - half, 100 + half))


@given(st.floats(-5, 5), st.floats(-0.9, 0.9))
@example(5.0, 9e-7)
@example(5.0, 1.1e-8)
@example(-5.0, -9e-9)
def test_halls_transformation_is_undone(width: float, skewness: float) -> None:
    t = sequences._unskewed(width, skewness)
    assert t + skewness / 3 * t**2 + skewness**2 / 27 * t**3 + skewness / 6 == pytest.approx(width, abs=1e-6)


def test_a_mean_has_no_upper_end_before_slow_requests_could_be_seen() -> None:
    values = latencies(np.random.default_rng(3), 400)
    low, high = mean_interval(Moments.of(values[:100]), ALPHA)
    assert low > 0
    assert high == math.inf
    assert mean_interval(Moments.of(values), ALPHA)[1] < math.inf


def test_a_ratio_of_constant_means_is_known_exactly() -> None:
    assert mean_ratio(Moments.of(np.full(200, 90.0)), Moments.of(np.full(200, 100.0)), ALPHA) == (0.9, 0.9)


@given(st.integers(0, 300), st.integers(0, 300))
def test_a_share_ends_where_the_evidence_reaches_its_limit(hits: int, misses: int) -> None:
    count = hits + misses
    low, high = share_interval(hits, count, ALPHA)
    assert low <= (hits / count if count else 0.5) <= high
    for end, open_end in ((low, 0.0), (high, 1.0)):
        if end != open_end:
            assert sequences._share_evidence(end, hits, count) == pytest.approx(-math.log(ALPHA), abs=1e-6)
        else:
            assert sequences._share_evidence(end, hits, count) < -math.log(ALPHA)


@pytest.mark.parametrize("seen", [(5, 100, 1, 100), (0, 50, 30, 60), (20, 20, 0, 20), (3, 1000, 2, 10), (0, 0, 4, 9)])
def test_a_difference_of_shares_is_the_furthest_pair_that_is_left(seen: tuple[int, int, int, int]) -> None:
    hits1, count1, hits2, count2 = seen
    grid = np.linspace(0, 1, 1001)
    one = np.array([sequences._share_evidence(q, hits1, count1) for q in grid])
    two = np.array([sequences._share_evidence(q, hits2, count2) for q in grid])
    left = one[:, None] + two[None, :] < -math.log(ALPHA)
    differences = (grid[:, None] - grid[None, :])[left]
    low, high = share_difference(hits1, count1, hits2, count2, ALPHA)
    assert (low, high) == pytest.approx((differences.min(), differences.max()), abs=2.1e-3)
    assert low <= differences.min() + 1e-9
    assert high >= differences.max() - 1e-9
    back_low, back_high = share_difference(hits2, count2, hits1, count1, ALPHA)
    assert (-back_high, -back_low) == pytest.approx((low, high))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=300))
def test_a_bounded_means_interval_holds_the_plain_mean(values: list[float]) -> None:
    low, high = bounded_mean_interval(np.array(values), ALPHA)
    assert 0 <= low <= np.mean(values) + 1e-12
    assert np.mean(values) - 1e-12 <= high <= 1


def misses(draw: Callable[[np.random.Generator], list[bool]], repetitions: int = 200) -> int:
    """In how many repetitions an interval missed at any look."""
    return sum(not all(draw(np.random.default_rng([4, i]))) for i in range(repetitions))


LOOKS = range(50, 1501, 50)


def test_quantiles_hold_at_all_looks_for_values_that_tie() -> None:
    """Five distinct values, the medians' mass on both sides: where a rule for continuous values would go wrong."""
    values, chances = np.array([10.0, 20.0, 30.0, 40.0, 90.0]), [0.2, 0.3, 0.3, 0.14, 0.06]

    def draw(rng: np.random.Generator) -> list[bool]:
        one, two = rng.choice(values, 1500, p=chances), rng.choice(values, 1500, p=chances)
        found = []
        for count in LOOKS:
            low, high = quantile_interval(np.sort(one[:count]), 0.5, ALPHA)
            found.append(low <= 30 and high >= 20)  # each of 20..30 is a median
            low, high = quantile_ratio(np.sort(one[:count]), np.sort(two[:count]), 0.95, ALPHA)
            found.append(low <= 1 <= high)
        return found

    assert misses(draw) <= 10  # two sequences at 5 %: 20 are allowed on average


@pytest.mark.parametrize("p", [0.5, 0.95, 0.99])
def test_quantiles_hold_at_all_looks(p: float) -> None:
    truth = float(np.quantile(latencies(np.random.default_rng(0), 2_000_000), p))

    def draw(rng: np.random.Generator) -> list[bool]:
        values = latencies(rng, 1500)
        intervals = (quantile_interval(np.sort(values[:count]), p, ALPHA) for count in LOOKS)
        return [low <= truth <= high for low, high in intervals]

    assert misses(draw) <= 15  # 10 on average at most, and less than that with 1500 values


def test_means_hold_at_all_looks_for_skewed_values() -> None:
    truth = 200 * math.exp(0.3**2 / 2) * 1.04

    def draw(rng: np.random.Generator) -> list[bool]:
        one, two = latencies(rng, 1500), latencies(rng, 1500)
        found = []
        for count in LOOKS:
            first, second = Moments.of(one[:count]), Moments.of(two[:count])
            low, high = mean_interval(first, ALPHA)
            ratio_low, ratio_high = mean_ratio(first, second, ALPHA)
            found += [low <= truth <= high, ratio_low <= 1 <= ratio_high]
        return found

    assert misses(draw) <= 20


def test_shares_and_agreement_hold_at_all_looks() -> None:
    def draw(rng: np.random.Generator) -> list[bool]:
        one, two, agreement = (
            np.cumsum(rng.random(1500) < 0.03),
            np.cumsum(rng.random(1500) < 0.03),
            rng.beta(6, 4, 1500),
        )
        found = []
        for count in LOOKS[::3]:
            low, high = share_interval(int(one[count - 1]), count, ALPHA)
            apart, together = share_difference(int(one[count - 1]), count, int(two[count - 1]), count, ALPHA)
            least, most = bounded_mean_interval(agreement[:count], ALPHA)
            found += [low <= 0.03 <= high, apart <= 0 <= together, least <= 0.6 <= most]
        return found

    assert misses(draw, 100) <= 10


def test_a_textbook_interval_does_not_hold_at_all_looks() -> None:
    """The counting above finds a sequence that is none."""

    def draw(rng: np.random.Generator) -> list[bool]:
        values = rng.normal(100, 10, 1500)
        return [abs(values[:count].mean() - 100) < 19.6 / math.sqrt(count) for count in LOOKS]

    assert misses(draw) > 30
