"""Bounds on a mean of correlated tokens: exact where that can be had, and honest for data that is not normal."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from cluster.evaluate.interval import LEAST_BLOCKS, POWER, t_quantile, upper_bound

Floats = NDArray[np.float64]


@pytest.mark.parametrize("p", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("df", [4.0, 7.5, 30.0, 255.0])
def test_t_quantiles_are_student_s(p: float, df: float) -> None:
    assert t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=2e-3)
    assert t_quantile(0.5, df) == 0
