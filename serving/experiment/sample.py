"""The values of one metric that one arm has shown: kept sorted as they come, so that a look costs little."""

import math
from array import array
from collections.abc import Iterable

import numpy as np

from serving.experiment.sequences import (
    Floats,
    Interval,
    Moments,
    mean_interval,
    mean_ratio,
    quantile_interval,
    quantile_ratio,
)

QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
STATISTICS = ("mean", *QUANTILES)


class Sample:
    """Values >= 0, rounded to 1e-3 so that a snapshot holds exactly what was counted."""

    def __init__(self, values: Iterable[float] = ()) -> None:
        self.values = array("d", values)
        """In the order in which they came."""
        self._sorted: Floats = np.empty(0)

    def __len__(self) -> int:
        return len(self.values)

    def add(self, value: float) -> None:
        """Take in one more value. Constant time: it is sorted in at the next look, with all others since the last.

        Raises:
            ValueError: it is no finite number.
        """
        if not math.isfinite(value):
            raise ValueError(f"{value} is no measurement")
        self.values.append(max(0.0, round(value, 3)))

    def ordered(self) -> Floats:
        """All values, sorted."""
        if len(self._sorted) < len(self.values):
            new = np.sort(np.array(self.values[len(self._sorted) :]))
            self._sorted = np.insert(self._sorted, np.searchsorted(self._sorted, new), new)
        return self._sorted

    def estimate(self, statistic: str) -> float | None:
        """The sample's own statistic; None without values. Quantiles are linearly interpolated."""
        if not self.values:
            return None
        ordered = self.ordered()
        if statistic == "mean":
            return float(ordered.mean())
        part, whole = math.modf((len(ordered) - 1) * QUANTILES[statistic])
        low, high = ordered[int(whole)], ordered[min(int(whole) + 1, len(ordered) - 1)]
        return float(low + part * (high - low))

    def interval(self, statistic: str, alpha: float) -> Interval:
        """The confidence sequence of one statistic at this look."""
        if statistic == "mean":
            return mean_interval(self.moments(), alpha)
        return quantile_interval(self.ordered(), QUANTILES[statistic], alpha)

    def moments(self) -> Moments:
        """What a mean's interval needs. From the sorted values: the same values give the same bits after a restart."""
        return Moments.of(self.ordered())


def gain(candidate: Sample, control: Sample, statistic: str) -> float | None:
    """By which share the candidate's statistic is lower than control's: 1 - candidate / control. None without both."""
    ours, theirs = candidate.estimate(statistic), control.estimate(statistic)
    return None if ours is None or not theirs else 1 - ours / theirs


def gain_interval(candidate: Sample, control: Sample, statistic: str, alpha: float) -> Interval:
    """The confidence sequence of :func:`gain`; from -inf (nothing known) to 1."""
    if statistic == "mean":
        low, high = mean_ratio(candidate.moments(), control.moments(), alpha)
    else:
        low, high = quantile_ratio(candidate.ordered(), control.ordered(), QUANTILES[statistic], alpha)
    return 1 - high, 1 - low
