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
    return mean_of_ratios([(hits, totals)], confidence, resamples, seed)


def mean_of_ratios(
    strata: Sequence[tuple[Sequence[float], Sequence[float]]],
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """The mean over strata of :func:`ratio_interval`'s estimate, each stratum of equal weight.

    Examples are resampled within their stratum, so that the strata's errors partly cancel. (The
    paper's "Average" rows mostly print the mean of the rows' bounds instead, which is wider.)

    Raises ConfigError as :func:`paired_difference`, and without strata.
    """
    pairs = [_checked(hits, totals) for hits, totals in strata]
    if not pairs:
        raise ConfigError("nothing to average: give at least one set of scores")
    # A stratum whose resamples are all alike (or of one example) adds a constant.
    fixed = [len(h) < 2 or (np.ptp(h) == 0 and np.ptp(t) == 0) for h, t in pairs]
    constant = sum(h.sum() / t.sum() for (h, t), still in zip(pairs, fixed, strict=True) if still)
    varying = [pair for pair, still in zip(pairs, fixed, strict=True) if not still]

    def mean(*picks: np.ndarray, axis: int = -1) -> np.ndarray:
        ratios = (
            h[pick].sum(axis=axis) / t[pick].sum(axis=axis)
            for pick, (h, t) in zip(picks, varying, strict=True)
        )
        return (constant + sum(ratios)) / len(pairs)

    # Indices stand for examples, so that hits and totals of one example stay together.
    return _bootstrap(
        [np.arange(len(h)) for h, _ in varying], mean, confidence, resamples, seed, paired=False
    )


def recovery(system: float, baseline: float) -> float:
    """Share of the baseline's score that the system keeps (1.0 is all of it); NaN of a zero one."""
    return system / baseline if baseline else float("nan")


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


def _bootstrap(
    data, statistic, confidence: float, resamples: int, seed: int, paired: bool = True
) -> Interval:
    estimate = float(statistic(*data, axis=-1))
    # With no spread at all (or one example) every resample is the same: the interval is a point.
    if not data or len(data[0]) < 2 or all(np.ptp(column) == 0 for column in data):
        return Interval(estimate, estimate, estimate)
    found = bootstrap(
        data,
        statistic,
        paired=paired and len(data) > 1,
        vectorized=True,
        confidence_level=confidence,
        n_resamples=resamples,
        method="percentile",
        batch=256,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(estimate, float(found.low), float(found.high))
