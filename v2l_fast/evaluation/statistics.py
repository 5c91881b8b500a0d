"""Paired comparisons of two systems on the same examples.

Intervals are percentile bootstrap over examples (scipy). A claim needs its interval: non-inferior
when the whole interval lies above -margin, equivalent when it lies inside +-margin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

from v2l_fast.errors import ConfigError


@dataclass(frozen=True)
class Interval:
    """An estimate and its bootstrap confidence interval."""

    estimate: float
    low: float
    high: float

    def non_inferior(self, margin: float) -> bool:
        """The difference is not worse than -margin: the lower bound lies above it."""
        return self.low > -_positive(margin)

    def equivalent(self, margin: float) -> bool:
        """The difference lies inside +-margin with both bounds."""
        return self.low > -_positive(margin) and self.high < margin


def mean_interval(
    values: Sequence[float], confidence: float = 0.95, resamples: int = 9999, seed: int = 0
) -> Interval:
    """Mean of one score per example. Raises ConfigError without values or with NaN."""
    (array,) = _checked(values)
    return _bootstrap((array,), np.mean, confidence, resamples, seed)


def paired_difference(
    system: Sequence[float],
    baseline: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """Mean of system - baseline, resampling examples so that pairs stay together.

    Raises ConfigError when the lengths differ, or without values, or with NaN.
    """
    first, second = _checked(system, baseline)

    def difference(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        return x.mean(axis=axis) - y.mean(axis=axis)

    return _bootstrap((first, second), difference, confidence, resamples, seed)


def ratio_interval(
    hits: Sequence[float],
    totals: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """sum(hits) / sum(totals) over examples that carry several items each, resampling examples."""
    first, second = _checked(hits, totals)

    def ratio(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        return x.sum(axis=axis) / y.sum(axis=axis)

    return _bootstrap((first, second), ratio, confidence, resamples, seed)


def _positive(margin: float) -> float:
    if not margin > 0:
        raise ConfigError(f"margin must be positive, not {margin}")
    return margin


def _checked(*columns: Sequence[float]) -> list[np.ndarray]:
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    if len({len(array) for array in arrays}) != 1:
        lengths = " and ".join(str(len(array)) for array in arrays)
        raise ConfigError(f"paired scores differ in length: {lengths}; score the same examples")
    if len(arrays[0]) == 0 or any(np.isnan(array).any() for array in arrays):
        raise ConfigError("scores are empty or hold NaN; score every example")
    return arrays


def _bootstrap(data, statistic, confidence: float, resamples: int, seed: int) -> Interval:
    estimate = float(statistic(*data, axis=-1))
    # With no spread at all (or one example) every resample is the same: the interval is a point.
    if len(data[0]) < 2 or all(np.ptp(column) == 0 for column in data):
        return Interval(estimate, estimate, estimate)
    found = bootstrap(
        data,
        statistic,
        paired=len(data) > 1,
        vectorized=True,
        confidence_level=confidence,
        n_resamples=resamples,
        method="percentile",
        batch=256,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(estimate, float(found.low), float(found.high))
