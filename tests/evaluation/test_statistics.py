"""Paired bootstrap and the decision rules."""

import numpy as np
import pytest

from v2l_fast.errors import ConfigError
from v2l_fast.evaluation.statistics import (
    DIFFERENCES,
    Interval,
    auroc,
    holm,
    mean_interval,
    mean_of_ratios,
    paired_difference,
    ratio_interval,
    recovery,
    required_videos,
)


def naive_interval(rows: np.ndarray, statistic, seed: int) -> tuple[float, float]:
    """Percentile bootstrap written as a loop."""
    rng = np.random.default_rng(seed)
    result = [statistic(rows[rng.integers(len(rows), size=len(rows))]) for _ in range(4000)]
    return tuple(np.percentile(result, [2.5, 97.5]))


@pytest.fixture
def scores():
    rng = np.random.default_rng(3)
    base = rng.random(120)
    return np.stack([np.clip(base + rng.normal(0.02, 0.05, 120), 0, 1), base], axis=1)


def test_paired_difference_equals_a_loop(scores):
    result = paired_difference(scores[:, 0], scores[:, 1], resamples=4000)
    low, high = naive_interval(scores, lambda r: (r[:, 0] - r[:, 1]).mean(), 1)
    assert result.estimate == pytest.approx((scores[:, 0] - scores[:, 1]).mean())
    # Two bootstraps of 4,000 resamples agree to a small part of the interval's width.
    assert abs(result.low - low) < 0.1 * (high - low)
    assert abs(result.high - high) < 0.1 * (high - low)


def test_pairing_narrows_the_interval(scores):
    together = paired_difference(scores[:, 0], scores[:, 1])
    apart = paired_difference(np.sort(scores[:, 0]), scores[::-1, 1])
    assert together.high - together.low < 0.5 * (apart.high - apart.low)


def test_ratio_weighs_examples_by_their_items():
    hits, totals = [1, 9, 5, 4], [2, 10, 10, 4]
    result = ratio_interval(hits, totals)
    assert result.estimate == pytest.approx(19 / 26)
    rows = np.stack([hits, totals], axis=1)
    low, high = naive_interval(rows, lambda r: r[:, 0].sum() / r[:, 1].sum(), 5)
    # Four examples: percentiles alone are too narrow.
    assert result.low <= low and high <= result.high
    hits, totals = hits * 60, totals * 60
    result = ratio_interval(hits, totals)
    rows = np.stack([hits, totals], axis=1)
    low, high = naive_interval(rows, lambda r: r[:, 0].sum() / r[:, 1].sum(), 5)
    assert abs(result.low - low) < 0.1 * (high - low)
    assert abs(result.high - high) < 0.1 * (high - low)


def stratum(sums, counts, names=None) -> dict:
    """Videos named by their index unless names are passed."""
    names = range(len(sums)) if names is None else names
    return dict(zip(names, zip(sums, counts, strict=True), strict=True))


def test_mean_of_ratios_equals_a_loop_over_strata():
    """Strata of different videos are resampled each on its own."""
    rng = np.random.default_rng(4)
    strata = []
    for size, mean in ((160, 0.3), (125, -0.1)):
        totals = rng.integers(1, 6, size)
        strata.append((rng.normal(mean, 0.1, size) * totals, totals))
    named = [stratum(h, t, [(i, j) for j in range(len(h))]) for i, (h, t) in enumerate(strata)]
    result = mean_of_ratios(named, resamples=4000)
    expected = []
    for _ in range(4000):
        picks = [(rng.integers(len(t), size=len(t)), h, t) for h, t in strata]
        expected.append(np.mean([h[i].sum() / t[i].sum() for i, h, t in picks]))
    low, high = np.percentile(expected, [2.5, 97.5])
    assert result.estimate == pytest.approx(np.mean([h.sum() / t.sum() for h, t in strata]))
    assert abs(result.low - low) < 0.1 * (high - low)
    assert abs(result.high - high) < 0.1 * (high - low)


@pytest.mark.parametrize("videos", [40, 400])
def test_an_average_over_the_same_videos_keeps_their_correlation(videos):
    """Two strata with the same scores are as uncertain as one; apart, they would partly cancel."""
    scores = np.random.default_rng(5).random(videos)
    one = stratum(scores, [1.0] * videos)
    alone, together = mean_of_ratios([one]), mean_of_ratios([one, one])
    apart = mean_of_ratios([one, {f"other {k}": v for k, v in one.items()}])
    assert together.high - together.low == pytest.approx(alone.high - alone.low, rel=1e-6)
    assert apart.high - apart.low < 0.8 * (alone.high - alone.low)


def test_videos_of_one_stratum_and_of_two_are_resampled_among_themselves():
    rng = np.random.default_rng(6)
    scores = rng.random((2, 300))
    first = stratum(scores[0], [1.0] * 300)
    second = stratum(scores[1, :200], [2.0] * 200)
    result = mean_of_ratios([first, second], resamples=4000)
    expected = []
    for _ in range(4000):
        both, rest = rng.integers(200, size=200), 200 + rng.integers(100, size=100)
        mean = np.concatenate([scores[0, both], scores[0, rest]]).mean()
        expected.append((mean + scores[1, both].sum() / 400) / 2)
    low, high = np.percentile(expected, [2.5, 97.5])
    assert abs(result.low - low) < 0.1 * (high - low)
    assert abs(result.high - high) < 0.1 * (high - low)


def test_strata_without_spread_shift_the_average_and_widen_it():
    """A stratum of one video says next to nothing, and an average cannot say more."""
    varying = stratum(np.random.default_rng(7).random(200), [1.0] * 200)
    alone = mean_of_ratios([varying])
    widths = []
    for videos in (1, 30, 1000):
        still = stratum([1.0] * videos, [1.0] * videos, [f"still {i}" for i in range(videos)])
        both = mean_of_ratios([still, varying])
        assert both.estimate == pytest.approx((1 + alone.estimate) / 2)
        assert both.high == pytest.approx((1 + alone.high) / 2)
        missed = 1 - 0.025 ** (1 / videos)
        assert both.low == pytest.approx((1 - missed + alone.low) / 2)
        widths.append(both.high - both.low)
    assert widths == sorted(widths, reverse=True)


def draws() -> dict:
    """Scores as evaluations meet them, with their true means."""

    def captions(rng, n):
        return np.where(rng.random(n) < 0.9, 1.0, rng.integers(4, 9, n) / 9)

    def differences(rng, n):
        return rng.choice([-1.0, 0.0, 1.0], p=[0.06, 0.92, 0.02], size=n)

    return {
        "rare failures": (lambda rng, n: (rng.random(n) < 0.95) * 1.0, 0.95, (0.0, 1.0)),
        "right or wrong": (lambda rng, n: (rng.random(n) < 0.8) * 1.0, 0.8, (0.0, 1.0)),
        "captions": (captions, 0.9 + 0.1 * 6 / 9, (0.0, 1.0)),
        "skewed": (lambda rng, n: rng.beta(4, 0.4, n), 4 / 4.4, (0.0, 1.0)),
        "uniform": (lambda rng, n: rng.random(n), 0.5, (0.0, 1.0)),
        "differences": (differences, -0.04, DIFFERENCES),
    }


@pytest.mark.parametrize("kind", draws())
@pytest.mark.parametrize("videos", [8, 16, 64])
def test_coverage_of_small_samples(kind, videos):
    """A nominal 95% covers at least 92%; percentiles alone cover 55 to 93% here."""
    draw, mean, bounds = draws()[kind]
    rng = np.random.default_rng(videos)
    covered = 0
    for _ in range(400):
        scores = draw(rng, videos).tolist()
        result = mean_interval(scores, resamples=99, bounds=bounds)
        covered += result.low <= mean <= result.high
    assert covered >= 0.92 * 400


def test_recovery():
    assert recovery(0.843, 0.804, 0.296) == pytest.approx((0.843 - 0.296) / (0.804 - 0.296))
    assert np.isnan(recovery(0.3, 0.2, 0.2)) and np.isnan(recovery(0.3, 0.1, 0.2))
    assert recovery(0.309, 0.367) == pytest.approx(0.842, abs=5e-4)
    assert np.isnan(recovery(0.3, 0.0))


def test_same_scores_same_interval(scores):
    assert mean_interval(scores[:, 0]) == mean_interval(scores[:, 0])


def test_no_spread_is_no_proof():
    """The interval reaches as far as what so many videos can miss: the exact binomial bound."""
    for videos in (1, 2, 5, 20, 500):
        missed = 1 - 0.025 ** (1 / videos)
        same = mean_interval([1.0] * videos)
        assert (same.estimate, same.high) == (1.0, 1.0)
        assert same.low == pytest.approx(1 - missed)
        equal = paired_difference([0.5] * videos, [0.5] * videos)
        assert (equal.low, equal.high) == pytest.approx((-missed, missed))
        # Equal differences, as much as equal scores.
        better = paired_difference([0.9] * videos, [0.5] * videos)
        assert better.low == pytest.approx(0.4 - 1.4 * missed)
        # Scores of any size have no scale to reach.
        assert mean_interval([-3.0] * videos, bounds=None) == Interval(-3.0, -3.0, -3.0)
    # The same share of each video, with several examples in each.
    half = ratio_interval([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert half.low == pytest.approx(0.5 * 0.025 ** (1 / 3))


def test_an_interval_stays_on_the_scale():
    result = mean_interval([1.0, 1.0, 1.0, 0.9])
    assert 0 <= result.low <= result.estimate <= result.high <= 1
    result = paired_difference([1.0, 1.0, 1.0], [0.0, 0.0, 0.1])
    assert -1 <= result.low and result.high <= 1


@pytest.mark.parametrize(("margin", "videos"), [(0.05, 72), (0.15, 23), (1.0, 1)])
def test_a_claim_needs_as_many_videos_as_can_miss_the_margin(margin, videos):
    assert required_videos(margin) == videos
    if margin < 1:
        missed = [1 - 0.025 ** (1 / n) for n in (videos, videos - 1)]
        assert missed[0] <= margin < missed[1]


def test_holm_steps_down_from_the_strongest_claim():
    def around(estimate, half):
        return Interval(estimate, estimate - half, estimate + half)

    strong, weak, failed = around(0.0, 0.01), around(-0.02, 0.0299), around(-0.06, 0.02)
    assert weak.non_inferior(0.05)
    # One after the other: the strong one does not help the weak one against two others.
    assert holm([weak], 0.05, False) == [True]
    assert holm([failed, weak, strong], 0.05, False) == [False, False, True]
    assert holm([strong] * 20, 0.05, True) == [True] * 20
    better = around(0.2, 0.02)
    assert holm([better], 0.05, False) == [True] and holm([better], 0.05, True) == [False]


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
    with pytest.raises(ConfigError, match="empty or contain NaN"):
        mean_interval([])
    with pytest.raises(ConfigError, match="empty or contain NaN"):
        mean_interval([1.0, float("nan")])
    with pytest.raises(ConfigError, match="nothing to average"):
        mean_of_ratios([])
    with pytest.raises(ConfigError, match="margin must be positive"):
        Interval(0, 0, 0).non_inferior(0)


def test_auroc_counts_ties_half():
    assert auroc([1.0, 2.0], [0.0, 1.0]) == 0.875
    assert auroc([1.0], [1.0]) == 0.5
