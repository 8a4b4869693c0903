"""A measured distribution in a few figures, with 95 % intervals."""

from collections.abc import Sequence
from functools import lru_cache
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
CONFIDENCE = 0.95
_RESAMPLINGS = 1000
_POOLED_RESAMPLINGS = 200
Interval = tuple[float | None, float | None]


class Summary(TypedDict, total=False):
    """``intervals`` has one for the mean and each quantile; a bound of None: the sample is too small for one.

    Without any value a summary is empty.
    """

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    intervals: dict[str, Interval]


def summarise(values: Sequence[float], seed: int = 0) -> Summary:
    """Mean and quantiles (linear interpolation) of independent values >= 0.

    A quantile's interval lies between two order statistics and holds exactly, whatever the distribution; the mean's is
    a percentile bootstrap. Requests that shared a server under load are not quite independent, so both are somewhat
    too narrow there.
    """
    array = np.sort(np.asarray(values, dtype=np.float64))
    if not array.size:
        return {}
    rng = np.random.default_rng([seed, 3])
    means = np.fromiter((rng.choice(array, array.size).mean() for _ in range(_RESAMPLINGS)), np.float64, _RESAMPLINGS)
    intervals: dict[str, Interval] = {"mean": _middle(means)}
    for name, q in QUANTILES.items():
        low, high = order_ranks(array.size, q)
        # A time is never below 0, so that much is sure.
        intervals[name] = (
            0.0 if low is None else float(array[low - 1]),
            None if high is None else float(array[high - 1]),
        )
    return _summary(array, intervals)


def summarise_pooled(groups: Sequence[Sequence[float]], seed: int = 0) -> Summary:
    """The same of values that come in groups, such as the gaps within answers, which hang together.

    The intervals are percentile bootstraps that draw whole groups.
    """
    filled = [group for group in groups if group]
    if not filled:
        return {}
    array = np.concatenate([np.asarray(group, dtype=np.float64) for group in filled])
    owner = np.repeat(np.arange(len(filled)), [len(group) for group in filled])
    order = np.argsort(array, kind="stable")
    array, owner = array[order], owner[order]
    rng = np.random.default_rng([seed, 4])
    drawn = np.empty((_POOLED_RESAMPLINGS, 1 + len(QUANTILES)))
    for row in drawn:
        weights = np.bincount(rng.integers(len(filled), size=len(filled)), minlength=len(filled))[owner]
        upto = np.cumsum(weights)
        at = np.searchsorted(upto, np.array([*QUANTILES.values()]) * upto[-1])
        row[:] = [float(weights @ array) / upto[-1], *array[np.minimum(at, array.size - 1)]]
    names = ["mean", *QUANTILES]
    return _summary(array, {name: _middle(column) for name, column in zip(names, drawn.T, strict=True)})


def _summary(array: NDArray[np.float64], intervals: dict[str, Interval]) -> Summary:
    p50, p90, p95, p99 = (float(value) for value in np.quantile(array, [*QUANTILES.values()]))
    mean = float(array.mean())
    return {"count": array.size, "mean": mean, "p50": p50, "p90": p90, "p95": p95, "p99": p99, "intervals": intervals}


def _middle(resampled: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


@lru_cache(maxsize=256)
def order_ranks(n: int, q: float) -> tuple[int | None, int | None]:
    """Ranks (from 1) of the order statistics around the ``q`` quantile of a distribution, from ``n`` draws of it.

    How many of the draws lie below the quantile is binomial with (n, q) whatever the distribution, so the quantile is
    below the l-th smallest with probability P(B < l) and above the u-th with P(B >= u) (David and Nagaraja, Order
    Statistics, 7.1). Each side gets half of 1 - :data:`CONFIDENCE`; None where no rank is sure enough.
    """
    k = np.arange(n + 1)
    chosen = np.concatenate(([0.0], np.cumsum(np.log((n - k[:-1]) / (k[:-1] + 1)))))  # ln of n over k
    below = np.cumsum(np.exp(chosen + k * np.log(q) + (n - k) * np.log1p(-q)))  # P(B <= k)
    tail = (1 - CONFIDENCE) / 2
    low = int(np.searchsorted(below, tail, side="right"))
    high = int(np.searchsorted(below, 1 - tail, side="left")) + 1
    return low or None, high if high <= n else None
