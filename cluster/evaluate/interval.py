"""Confidence bounds on a mean per token where the tokens of a block are correlated, and the text they would need.

Pure Python, so that a laptop can hold it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

# The power that the text which a margin needs is stated for: how often a student that deserves it then passes.
POWER = 0.8
# Fewer blocks of equal size than this bound nothing: the standard error is then itself noise.
LEAST_BLOCKS = 5.0
# The skewness of few blocks is estimated too low. Twice the estimate brings simulated error rates nearer to the nominal
# one where a few documents are much worse than the others, and changes next to nothing for symmetric differences.
SKEWNESS_FACTOR = 2.0


@dataclass(frozen=True)
class Bound:
    """A mean per token with its one-sided upper confidence bound.

    Attributes:
        upper: infinite where the blocks are too few.
        se: standard error of the mean.
        width: what the bound is above the mean, in standard errors.
        tokens, blocks: measured.
    """

    mean: float
    upper: float
    se: float
    width: float
    tokens: int
    blocks: int

    def tokens_for(self, distance: float) -> float:
        """Tokens of such text with which a mean that is truly ``distance`` below 0 has its bound below 0, with POWER.

        Infinite where no amount of text would do.
        """
        if not (distance > 0 and math.isfinite(self.se)):
            return math.inf
        return self.tokens * ((self.width + NormalDist().inv_cdf(POWER)) * self.se / distance) ** 2


def t_quantile(p: float, df: float) -> float:
    """Student's t quantile by the expansion of Abramowitz and Stegun (26.7.5); within 1 % for p = 0.95 from df = 3."""
    x = NormalDist().inv_cdf(p)
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + sum(term / df**power for power, term in enumerate(terms, 1))


def upper_bound(sums_K: Sequence[float], tokens_K: Sequence[float], confidence: float) -> Bound:
    """One-sided upper confidence bound on ``sum(sums_K) / sum(tokens_K)``; the blocks are independent, tokens are not.

    The standard error is the cluster jackknife's, which is honest for blocks of unequal size (CV3 of MacKinnon, Nielsen
    and Webb, 2023, "Fast and reliable jackknife and bootstrap methods for cluster-robust inference"). Student's t has
    one degree of freedom less than the effective number of blocks, ``(sum n)^2 / sum n^2``. Where a few blocks are much
    worse than the others, the bound is raised by the transformation of Hall (1992, "On the removal of skewness by
    transformation"); a skew the other way does not lower it. What no measured document shows, no bound can know.

    Args:
        sums_K: per block the sum over its tokens; tokens_K: their number, above 0.
        confidence: from 0.5, where the bound is the mean itself, to below 1.
    """
    blocks, tokens, total = len(sums_K), sum(tokens_K), sum(sums_K)
    mean = total / tokens
    effective = tokens**2 / sum(n**2 for n in tokens_K)
    if confidence == 0.5:
        return Bound(mean, mean, math.nan, 0.0, int(tokens), blocks)
    if effective < LEAST_BLOCKS:
        return Bound(mean, math.inf, math.inf, math.inf, int(tokens), blocks)
    shifts_K = [(value - mean * n) / (tokens - n) for value, n in zip(sums_K, tokens_K, strict=True)]
    square = sum(shift**2 for shift in shifts_K)
    se = math.sqrt(square * (blocks - 1) / blocks)
    width = quantile = t_quantile(confidence, effective - 1)
    if square > 0:
        skew = sum(shift**3 for shift in shifts_K) / blocks / (square / blocks) ** 1.5
        width = max(quantile, -_unskewed(-quantile, SKEWNESS_FACTOR * skew / math.sqrt(effective)))
    return Bound(mean, mean + width * se, se, width, int(tokens), blocks)


def _unskewed(quantile: float, skew: float) -> float:
    """The quantile of a studentised mean of skewed values: the inverse of Hall's cubic transformation.

    Args:
        skew: skewness over the square root of the number of values.
    """
    if abs(skew) < 1e-6:
        return quantile
    return 3 / skew * (math.cbrt(1 + skew * (quantile - skew / 6)) - 1)
