"""Confidence sequences: intervals that hold at all looks at once.

An ordinary 95 % interval is wrong in 5 % of cases *at each look*, so whoever looks often enough sees a difference where
there is none. A confidence sequence (Darling and Robbins 1967) is wrong in at most a share ``alpha`` of all experiments
*at any look whatever*: it may be watched all the time and an experiment may be ended because of what it shows.

All of them here come from a nonnegative martingale that starts at 1 when the parameter is the true one, and
from Ville's inequality: it ever reaches ``1 / alpha`` with probability at most ``alpha``. What is not ruled out this
way is the interval.

What they assume: within an arm the requests are exchangeable (whatever comes in is dealt out by lot, and no request's
latency depends on the ones before it). Two things bend this. Split by *user* (sticky), the users are dealt out by lot
and not the requests: with few users who send many requests each, the intervals are too narrow. Slow drift in load hits
all arms alike and mostly cancels in comparisons; single arms' intervals then are about an average over the time seen.

An unbounded end is ``inf``. Samples are sorted float arrays of values >= 0.

Sources:
    [HR] Howard, Ramdas: Sequential estimation of quantiles with applications to A/B testing and best-arm
        identification. Bernoulli 28(3), 2022.
    [HRMS] Howard, Ramdas, McAuliffe, Sekhon: Time-uniform, nonparametric, nonasymptotic confidence sequences.
        Annals of Statistics 49(2), 2021.
    [WSR] Waudby-Smith, Ramdas: Estimating means of bounded random variables by betting. JRSS-B 86(1), 2024.
    [WASKR] Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas: Time-uniform central limit theory and asymptotic confidence
        sequences. Annals of Statistics 52(6), 2024.
    [H] Hall: On the removal of skewness by transformation. JRSS-B 54(1), 1992.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Interval = tuple[float, float]
Point = TypeVar("Point")

# The number of values per arm at which intervals are about as tight as they can be; elsewhere they hold as well, and
# are a little wider. Most decisions fall between 500 and 2000 values.
TUNED_FOR = 1000
# A quantile far out needs more values to say anything, so its sequence is tuned to later: to as many values as give the
# indicator "is below the quantile" the variance that TUNED_FOR values give it at the median, but no more than this.
TUNED_AT_MOST = 5000
# Below this many values the central limit theorem has nothing to say about a latency.
MEAN_NEEDS = 20
# And below this many, nothing about how high the mean may be: one in fifty requests may be a slow one.
UPPER_END_NEEDS = 200


@dataclass(frozen=True, slots=True)
class Moments:
    """What a mean's interval needs of a sample."""

    mean: float
    variance: float
    skewness: float
    count: int

    @classmethod
    def of(cls, values: Floats) -> "Moments":
        """The moments of some values; zeros of none."""
        if not len(values):
            return cls(0.0, 0.0, 0.0, 0)
        mean = float(values.mean())
        off = values - mean
        variance = float(off @ off) / len(values)
        skewness = float(off @ (off * off)) / len(values) / variance**1.5 if variance else 0.0
        return cls(mean, variance, skewness, len(values))


def quantile_interval(sample: Floats, p: float, alpha: float) -> Interval:
    """Where the p-quantile lies, for any distribution, with values tied or not.

    The number of values at or below the true quantile is a sum of coin flips of known probability p, so the ranks that
    the beta-binomial mixture does not rule out bound it ([HR], confidence sequences for a fixed quantile; the mixture
    is among the conjugate ones of [HRMS]). Values tied with the quantile are thought of as split by lot so that the
    probability is p exactly; the ends below take in either way of splitting.

    Args:
        sample: sorted values of one arm.
        p: in (0, 1).
        alpha: share of experiments in which the sequence may ever miss.

    Returns:
        Lower and upper end; 0 and inf while the sample says nothing. A quantile far out has no upper end for long:
        p99 gets one after some 800 values at alpha = 0.05.
    """
    first, evidence = _log_evidence(len(sample), p, alpha)
    possible = first + np.flatnonzero(evidence < -math.log(alpha))
    low, high = int(possible[0]), int(possible[-1])
    return (float(sample[low - 1]) if low else 0.0), (float(sample[high]) if high < len(sample) else math.inf)


def quantile_ratio(numerator: Floats, denominator: Floats, p: float, alpha: float) -> Interval:
    """Where the ratio of two arms' p-quantiles lies.

    If the ratio is r then the denominator's quantile is some x and the numerator's is r x. At the true x both arms'
    beta-binomial mixtures are martingales, and as each request goes to one arm, so is their product. A ratio is ruled
    out when the product is at least 1 / alpha for *every* x ([HR], section on A/B testing, there for the difference).
    At the median of 1000 values each this is a quarter narrower than two intervals at alpha / 2 each, divided.

    Args:
        numerator: sorted values of one arm.
        denominator: sorted values of the other.
        p: in (0, 1).
        alpha: share of experiments in which the sequence may ever miss.

    Returns:
        Lower and upper end; 0 and inf while the samples say nothing.
    """
    above_from, above = _log_evidence(len(numerator), p, alpha)
    below_from, below = _log_evidence(len(denominator), p, alpha)
    # Evidence is convex in the rank, so the ranks of the numerator that are possible beside a rank of the denominator
    # are a range around the least evident one.
    mode = int(np.argmin(above))
    left = -math.log(alpha) - below
    ranks = np.flatnonzero(left > above[mode])
    first = mode + 1 - np.searchsorted(above[mode::-1], left[ranks])
    last = mode - 1 + np.searchsorted(above[mode:], left[ranks])
    # Rank k says that the quantile lies between the k-th and the (k+1)-th value.
    upper, lower = _edges(numerator, above_from, len(above)), _edges(denominator, below_from, len(below))
    with np.errstate(divide="ignore", invalid="ignore"):
        highest = upper[last + 1] / lower[ranks]
        lowest = upper[first] / lower[ranks + 1]
    highest = np.where(np.isnan(highest), np.inf, highest)  # 0 / 0 and inf / inf rule nothing out
    lowest = np.where(np.isnan(lowest), 0.0, lowest)
    return float(lowest.min()), float(highest.max())


def mean_interval(moments: Moments, alpha: float) -> Interval:
    """Where a mean lies, by an asymptotic confidence sequence: it holds as the central limit theorem does.

    In standard errors the half width is w = sqrt((1 + 1 / (t rho^2)) log((t rho^2 + 1) / alpha^2)) at t = count
    (the Gaussian mixture boundary of [WASKR]). Latencies are skewed, so their studentised mean is skewed the other
    way; the ends are those of Hall's monotone transformation ([H], here with w in the place of the normal quantile),
    whose correction vanishes beside w as values come in.

    No sequence can bound a mean from above without knowing how slow a request may ever be. The upper end therefore
    comes later than the lower: what is rare and slow must have had a chance to show itself.

    Args:
        moments: of values >= 0.
        alpha: share of experiments in which the sequence may ever miss, in the limit.

    Returns:
        Lower and upper end; 0 before MEAN_NEEDS values and inf before UPPER_END_NEEDS.
    """
    mean, variance, skewness, count = moments.mean, moments.variance, moments.skewness, moments.count
    if count < MEAN_NEEDS:
        return 0.0, math.inf
    error, width = math.sqrt(variance / count), _normal_width(count, alpha)
    low = mean - error * _unskewed(width, skewness / math.sqrt(count))
    high = mean - error * _unskewed(-width, skewness / math.sqrt(count))
    return max(0.0, low), (high if count >= UPPER_END_NEEDS else math.inf)


def mean_ratio(numerator: Moments, denominator: Moments, alpha: float) -> Interval:
    """Where the ratio of two arms' means lies, by an asymptotic confidence sequence on the logarithm of the ratio.

    By the delta method log(m1 / m2) has the variance s1^2 / (n1 m1^2) + s2^2 / (n2 m2^2). Its estimate, taken in
    units of information, is a Brownian motion in the limit, so the Gaussian mixture boundary of [WASKR] applies, with t
    the number of values per arm that would give this variance if both arms had as many.

    Args:
        numerator: of one arm's values, >= 0.
        denominator: of the other's.
        alpha: share of experiments in which the sequence may ever miss, in the limit.

    Returns:
        Lower and upper end; 0 and inf before both arms have UPPER_END_NEEDS values, or where a mean is 0.
    """
    if min(numerator.count, denominator.count) < UPPER_END_NEEDS or min(numerator.mean, denominator.mean) <= 0:
        return 0.0, math.inf
    spread1, spread2 = (arm.variance / arm.mean**2 for arm in (numerator, denominator))
    ratio = numerator.mean / denominator.mean
    squared_error = spread1 / numerator.count + spread2 / denominator.count
    if squared_error == 0:
        return ratio, ratio
    half = math.sqrt(squared_error) * _normal_width((spread1 + spread2) / squared_error, alpha)
    return ratio * math.exp(-half), ratio * math.exp(half)


def share_interval(hits: int, count: int, alpha: float) -> Interval:
    """Where the probability of a yes-or-no event lies.

    All q that the beta-binomial mixture with Jeffreys' prior Beta(1/2, 1/2) does not rule out (Robbins 1970; [HRMS],
    conjugate mixtures): B(1/2 + hits, 1/2 + misses) / B(1/2, 1/2) / (q^hits (1 - q)^misses) < 1 / alpha.

    Args:
        hits: how often it happened.
        count: of how many.
        alpha: share of experiments in which the sequence may ever miss.
    """
    limit = -math.log(alpha)
    low = _widest(lambda slope: _share_at(hits, count, -slope), lambda q: _share_evidence(q, hits, count) < limit)
    high = _widest(lambda slope: _share_at(hits, count, slope), lambda q: _share_evidence(q, hits, count) < limit)
    return low, high


def share_difference(hits1: int, count1: int, hits2: int, count2: int, alpha: float) -> Interval:
    """Where the difference of two arms' probabilities (first minus second) lies.

    As for quantiles: a difference is ruled out when the product of both arms' mixtures (see :func:`share_interval`) is
    at least 1 / alpha for every pair of probabilities that has it. What is not ruled out is a convex set of pairs; its
    corner in either direction is where the slopes of both arms' evidence are opposite.
    """
    limit = -math.log(alpha)

    def possible(pair: tuple[float, float]) -> bool:
        return _share_evidence(pair[0], hits1, count1) + _share_evidence(pair[1], hits2, count2) < limit

    low = _widest(lambda slope: (_share_at(hits1, count1, -slope), _share_at(hits2, count2, slope)), possible)
    high = _widest(lambda slope: (_share_at(hits1, count1, slope), _share_at(hits2, count2, -slope)), possible)
    return low[0] - low[1], high[0] - high[1]


def bounded_mean_interval(values: Floats, alpha: float) -> Interval:
    """Where the mean of values in [0, 1] lies: the predictable plug-in empirical-Bernstein sequence of [WSR].

    Args:
        values: in the order in which they came; each one's weight depends on those before it.
        alpha: share of experiments in which the sequence may ever miss.

    Returns:
        Lower and upper end within [0, 1], widened to take in the plain mean where it lies outside.
    """
    count = len(values)
    if not count:
        return 0.0, 1.0
    steps = np.arange(1, count + 1)
    means = (0.5 + np.cumsum(values)) / (steps + 1)
    variances = (0.25 + np.cumsum((values - means) ** 2)) / (steps + 1)
    means_before, variances_before = np.append(0.5, means[:-1]), np.append(0.25, variances[:-1])
    budget = math.log(2 / alpha)
    bets = np.minimum(np.sqrt(2 * budget / (variances_before * steps * np.log1p(steps))), 0.5)
    total = bets.sum()
    centre = float(bets @ values / total)
    half = float((budget + (values - means_before) ** 2 @ (-np.log1p(-bets) - bets)) / total)
    mean = float(values.mean())
    return max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half))


def _prior_weight(alpha: float, tuned_for: float) -> float:
    """How many values the mixture's prior is worth so that intervals are tightest at ``tuned_for`` values.

    1 / rho^2 of [WASKR], in the approximation they give: rho^2 = (-2 log alpha + log(-2 log alpha) + 1) / t.
    """
    return tuned_for / (1 - 2 * math.log(alpha) + math.log(-2 * math.log(alpha)))


def _normal_width(count: float, alpha: float) -> float:
    """Half the width of a mean's asymptotic sequence at ``count`` values, in standard errors."""
    ratio = count / _prior_weight(alpha, TUNED_FOR)
    return math.sqrt((1 + 1 / ratio) * math.log((ratio + 1) / alpha**2))


def _unskewed(width: float, skewness: float) -> float:
    """The studentised deviation that Hall's cubic transformation takes to ``width``.

    Args:
        skewness: of the mean, that is of the values divided by the root of their number.
    """
    # Nearer to zero the subtraction below loses more digits than the correction has.
    if abs(skewness) < 1e-8:
        return width
    return 3 / skewness * (math.cbrt(1 + skewness * (width - skewness / 6)) - 1)


@lru_cache(maxsize=256)
def _log_evidence(count: int, p: float, alpha: float) -> tuple[int, Floats]:
    """log of the mixture martingale for each number k of values below the p-quantile that is worth a thought.

    log [B(a + k, b + count - k) / B(a, b) / (p^k (1 - p)^(count - k))], prior Beta(a, b) with mean p. Convex in k.

    Returns:
        The least k and the evidence from it on. Numbers outside are twelve standard deviations off and ruled out.
    """
    weight = _prior_weight(alpha, min(TUNED_FOR / 4 / (p * (1 - p)), TUNED_AT_MOST))
    a, b = weight * p, weight * (1 - p)
    reach = 30 + 12 * math.sqrt((count + weight) * p * (1 - p))
    first, last = max(0, math.floor(count * p - reach)), min(count, math.ceil(count * p + reach))
    at_first = (
        *(math.lgamma(a + first), -math.lgamma(a), math.lgamma(b + count - first), -math.lgamma(b)),
        *(math.lgamma(a + b), -math.lgamma(a + b + count)),
        *(-first * math.log(p), -(count - first) * math.log1p(-p)),
    )
    k = np.arange(first, last)
    steps = np.log((a + k) / (b + count - k - 1)) + math.log((1 - p) / p)
    evidence = math.fsum(at_first) + np.concatenate(([0.0], np.cumsum(steps)))
    evidence.flags.writeable = False
    return first, evidence


def _edges(sample: Floats, first: int, ranks: int) -> Floats:
    """The values of ranks first .. first + ranks; before the first value lies 0, behind the last one inf."""
    inside = sample[max(0, first - 1) : first + ranks]
    return np.concatenate(([0.0] if first == 0 else [], inside, [math.inf] if first + ranks > len(sample) else []))


def _share_evidence(q: float, hits: int, count: int) -> float:
    """log of the mixture martingale of :func:`share_interval`, inf at a q that what was seen rules out."""
    misses = count - hits
    if (q <= 0 and hits) or (q >= 1 and misses):
        return math.inf
    mixture = math.lgamma(0.5 + hits) + math.lgamma(0.5 + misses) - math.lgamma(1.0 + count) - math.log(math.pi)
    return mixture - (hits * math.log(q) if hits else 0.0) - (misses * math.log1p(-q) if misses else 0.0)


def _share_at(hits: int, count: int, slope: float) -> float:
    """The q at which the evidence has this slope: the root in [0, 1] of slope q^2 + (count - slope) q = hits."""
    if slope < 0:
        return 1.0 - _share_at(count - hits, count, -slope)
    if hits == count:
        return 1.0
    linear = count - slope
    root = math.sqrt(linear * linear + 4 * slope * hits)
    if linear > 0:  # the two forms of the solution: each loses no digits where it is used
        return min(1.0, 2 * hits / (linear + root))
    return min(1.0, (root - linear) / (2 * slope))


def _widest(at: Callable[[float], Point], possible: Callable[[Point], bool]) -> Point:
    """The point furthest out that is not ruled out, along a path whose evidence grows with the slope."""
    low, high = -30.0, 40.0  # log of the slope: from none to steeper than any count makes it
    if possible(at(math.exp(high))):
        return at(math.exp(high))
    for _ in range(80):
        middle = (low + high) / 2
        if possible(at(math.exp(middle))):
            low = middle
        else:
            high = middle
    return at(math.exp(high))
