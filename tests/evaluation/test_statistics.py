"""Paired bootstrap and the decision rules."""

import numpy as np
import pytest

from v2l_fast.errors import ConfigError
from v2l_fast.evaluation.statistics import (
    Interval,
    mean_interval,
    mean_of_ratios,
    paired_difference,
    ratio_interval,
    recovery,
)


def naive_interval(rows: np.ndarray, statistic, seed: int) -> tuple[float, float]:
    """Percentile bootstrap written as a loop."""
    rng = np.random.default_rng(seed)
    found = [statistic(rows[rng.integers(len(rows), size=len(rows))]) for _ in range(4000)]
    return tuple(np.percentile(found, [2.5, 97.5]))


@pytest.fixture
def scores():
    rng = np.random.default_rng(3)
    base = rng.random(120)
    return np.stack([np.clip(base + rng.normal(0.02, 0.05, 120), 0, 1), base], axis=1)


def test_paired_difference_equals_a_loop(scores):
    found = paired_difference(scores[:, 0], scores[:, 1], resamples=4000)
    low, high = naive_interval(scores, lambda r: (r[:, 0] - r[:, 1]).mean(), 1)
    assert found.estimate == pytest.approx((scores[:, 0] - scores[:, 1]).mean())
    # Two bootstraps of 4,000 resamples agree to a small part of the interval's width.
    assert abs(found.low - low) < 0.1 * (high - low)
    assert abs(found.high - high) < 0.1 * (high - low)


def test_pairing_narrows_the_interval(scores):
    together = paired_difference(scores[:, 0], scores[:, 1])
    apart = paired_difference(np.sort(scores[:, 0]), scores[::-1, 1])
    assert together.high - together.low < 0.5 * (apart.high - apart.low)


def test_ratio_weighs_examples_by_their_items():
    hits, totals = [1, 9, 5, 4], [2, 10, 10, 4]
    found = ratio_interval(hits, totals)
    assert found.estimate == pytest.approx(19 / 26)
    rows = np.stack([hits, totals], axis=1)
    low, high = naive_interval(rows, lambda r: r[:, 0].sum() / r[:, 1].sum(), 5)
    assert abs(found.low - low) < 0.1 and abs(found.high - high) < 0.1


def test_mean_of_ratios_equals_a_loop_over_strata():
    rng = np.random.default_rng(4)
    strata = []
    for size, mean in ((60, 0.3), (25, -0.1)):
        totals = rng.integers(1, 6, size)
        strata.append((rng.normal(mean, 0.4, size) * totals, totals))
    found = mean_of_ratios(strata, resamples=4000)
    expected = []
    for _ in range(4000):
        picks = [(rng.integers(len(t), size=len(t)), h, t) for h, t in strata]
        expected.append(np.mean([h[i].sum() / t[i].sum() for i, h, t in picks]))
    low, high = np.percentile(expected, [2.5, 97.5])
    assert found.estimate == pytest.approx(np.mean([h.sum() / t.sum() for h, t in strata]))
    assert abs(found.low - low) < 0.1 * (high - low)
    assert abs(found.high - high) < 0.1 * (high - low)


def test_strata_without_spread_shift_the_average():
    varying = ([1.0, 2.0, 3.0, 2.0], [1.0] * 4)
    alone = mean_of_ratios([varying])
    for still in (([5.0], [1.0]), ([5.0, 5.0, 5.0], [1.0] * 3)):
        both = mean_of_ratios([still, varying])
        assert both.estimate == pytest.approx((5 + alone.estimate) / 2)
        assert both.low == pytest.approx((5 + alone.low) / 2)
        assert both.high == pytest.approx((5 + alone.high) / 2)
    assert mean_of_ratios([([5.0], [1.0]), ([1.0], [1.0])]) == Interval(3.0, 3.0, 3.0)


def test_recovery():
    assert recovery(0.309, 0.367) == pytest.approx(0.842, abs=5e-4)
    assert np.isnan(recovery(0.3, 0.0))


def test_same_seed_same_interval(scores):
    assert mean_interval(scores[:, 0], seed=7) == mean_interval(scores[:, 0], seed=7)


def test_without_spread_the_interval_is_a_point():
    assert mean_interval([1.0, 1.0, 1.0]) == Interval(1.0, 1.0, 1.0)
    assert mean_interval([0.3]) == Interval(0.3, 0.3, 0.3)
    assert paired_difference([1.0, 1.0], [0.5, 0.5]) == Interval(0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("low", "high", "non_inferior", "equivalent"),
    [
        (-0.049, 0.02, True, True),
        (-0.050, 0.02, False, False),
        (-0.010, 0.05, True, False),
        (0.010, 0.20, True, False),
        (-0.200, -0.1, False, False),
    ],
)
def test_rules_at_margin_five_hundredths(low, high, non_inferior, equivalent):
    interval = Interval((low + high) / 2, low, high)
    assert interval.non_inferior(0.05) is non_inferior
    assert interval.equivalent(0.05) is equivalent


def test_misuse_is_named():
    with pytest.raises(ConfigError, match="differ in length: 2 and 3"):
        paired_difference([1, 2], [1, 2, 3])
    with pytest.raises(ConfigError, match="empty or hold NaN"):
        mean_interval([])
    with pytest.raises(ConfigError, match="empty or hold NaN"):
        mean_interval([1.0, float("nan")])
    with pytest.raises(ConfigError, match="nothing to average"):
        mean_of_ratios([])
    with pytest.raises(ConfigError, match="margin must be positive"):
        Interval(0, 0, 0).non_inferior(0)
