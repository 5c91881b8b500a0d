"""Paired comparisons of two systems on the same examples.

Responsible for intervals and for the paper's rules: non-inferior if the whole interval lies above
-margin, equivalent if it lies inside ±margin. Table rows are `report`'s.

An interval is the percentile bootstrap over videos (scipy), widened where that is too narrow:

- Below :data:`SMALL` videos it is united with Korn and Graubard's interval, the exact binomial
  interval at the effective number of videos (Student's t for scores without bounds). The bootstrap
  ignores that the variance itself is estimated, and the distance from the scores to the ends of
  their range: at 8 videos, a nominal 95% covers 70 to 90%.
- If all videos have the same score, resampling gives no width, although a share of up to
  1 - (alpha / 2)^(1/n) of all videos (about 3.7 / n) may differ, by as much as the range allows,
  and be missed by a sample of n (the exact binomial bound).

For the same reason, a claim needs :func:`required_videos`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta, bootstrap, norm, t

from v2l_fast.errors import ConfigError

# Below this number of videos the percentile bootstrap alone is too narrow.
SMALL = 100
CONFIDENCE = 0.95
_TAIL = (1 - CONFIDENCE) / 2
RESAMPLES = 9999
# Range of a score, and of the difference of two scores.
SCORES, DIFFERENCES = (0.0, 1.0), (-1.0, 1.0)

Bounds = tuple[float, float]
# Video -> (sum of scores, number of examples).
Stratum = Mapping[Hashable, tuple[float, float]]


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval."""

    estimate: float
    low: float
    high: float

    def non_inferior(self, margin: float) -> bool:
        """Whether the lower bound lies above -margin."""
        return self.low > -_positive(margin)

    def equivalent(self, margin: float) -> bool:
        """Whether both bounds lie inside ±margin."""
        return self.low > -_positive(margin) and self.high < margin


def required_videos(margin: float) -> int:
    """Minimum number of videos for a claim at a margin: 72 at 0.05, 23 at 0.15.

    With fewer, even equal scores on every video are compatible with a difference of 1 on a share
    ``margin`` of all videos. Raises ConfigError if the margin is not positive.
    """
    missed = 1 - min(_positive(margin), 0.999)
    return math.ceil(math.log(_TAIL) / math.log(missed))


def mean_interval(
    values: Sequence[float], resamples: int = RESAMPLES, bounds: Bounds | None = SCORES
) -> Interval:
    """Mean of one score per example; arguments and errors as for :func:`mean_of_ratios`."""
    return ratio_interval(values, [1.0] * len(values), resamples, bounds)


def paired_difference(
    system: Sequence[float],
    baseline: Sequence[float],
    resamples: int = RESAMPLES,
    bounds: Bounds | None = DIFFERENCES,
) -> Interval:
    """Mean of system - baseline; examples are resampled in pairs.

    Raises ConfigError if the lengths differ; otherwise as :func:`mean_of_ratios`.
    """
    first, second = _checked(system, baseline)
    return mean_interval((first - second).tolist(), resamples, bounds)


def ratio_interval(
    hits: Sequence[float],
    totals: Sequence[float],
    resamples: int = RESAMPLES,
    bounds: Bounds | None = SCORES,
) -> Interval:
    """sum(hits) / sum(totals) over videos with several items each, resampling videos."""
    first, second = _checked(hits, totals)
    pairs = zip(first.tolist(), second.tolist(), strict=True)
    stratum: dict[Hashable, tuple[float, float]] = dict(enumerate(pairs))
    return mean_of_ratios([stratum], resamples, bounds)


def mean_of_ratios(
    strata: Sequence[Stratum], resamples: int = RESAMPLES, bounds: Bounds | None = SCORES
) -> Interval:
    """The mean over strata of (sum of scores / number of examples), all strata with equal weight.

    A video in several strata is resampled in all of them together, which preserves the correlation
    of its scores; videos in the same strata are resampled among themselves. (Most "Average" rows of
    the paper print the mean of the rows' bounds instead, which is wider.)

    Args:
        strata: one mapping of video -> (sum of scores, number of examples) per stratum.
        bounds: minimum and maximum score of an example, extended to the scores that occur; None for
            unbounded scores, whose interval has no width if they are all equal.

    Raises:
        ConfigError: there are no strata, or one is empty or contains NaN.
    """
    if not strata:
        raise ConfigError("nothing to average: give at least one set of scores")
    for stratum in strata:
        _checked(*zip(*stratum.values(), strict=True) if stratum else ([],))
    groups = _groups(strata)
    totals = sum(group.sum(axis=-1) for group in groups)
    estimate = float(_mean_ratio(totals))
    varying = [group for group in groups if np.ptp(_ratios(group), axis=-1).any()]
    scale = None
    if bounds is not None:
        ratios = np.concatenate([_ratios(group).ravel() for group in groups])
        scale = min(bounds[0], ratios.min()), max(bounds[1], ratios.max())
    low = high = 0.0
    if varying:
        low, high = _resampled(varying, totals, resamples)
        if min(group.shape[-1] for group in varying) < SMALL:
            lower, upper = _small_sample(varying, totals, scale)
            low, high = min(low, lower), max(high, upper)
    if scale is not None:
        for group in groups:
            if not any(group is other for other in varying):
                below, above = _missed(group, totals, scale)
                low, high = low - below, high + above
        low, high = max(low, scale[0] - estimate), min(high, scale[1] - estimate)
    return Interval(estimate, estimate + float(low), estimate + float(high))


def recovery(system: float, baseline: float, chance: float = 0.0) -> float:
    """Share of the baseline's score above ``chance`` that the system keeps (1.0: all of it).

    NaN if the baseline is not above chance. The paper's recoveries use a chance of 0.
    """
    above = baseline - chance
    return (system - chance) / above if above > 0 else float("nan")


def share(outcomes: Sequence[bool]) -> float | None:
    """Share of the outcomes that are true; None without outcomes."""
    return float(np.mean(outcomes)) if outcomes else None


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Probability that a positive scores above a negative, ties counted half; NaN without both."""
    high, low = np.asarray(positive)[:, None], np.asarray(negative)[None]
    if not high.size or not low.size:
        return float("nan")
    return float(np.mean((high > low) + 0.5 * (np.abs(high - low) < 1e-9)))


def holm(intervals: Sequence[Interval], margin: float, two_sided: bool) -> list[bool]:
    """Which of several claims hold together, by Holm's step-down procedure at 2.5% per side.

    P-values are those of a normal distribution with the interval's half-widths.

    Args:
        two_sided: equivalence (both bounds) instead of non-inferiority (the lower bound).
    """
    p_values = [_p_value(interval, _positive(margin), two_sided) for interval in intervals]
    holds, alive = [False] * len(p_values), True
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        alive = alive and p_values[index] < _TAIL / (len(p_values) - rank)
        holds[index] = alive
    return holds


def _p_value(interval: Interval, margin: float, two_sided: bool) -> float:
    quantile = norm.ppf((1 + CONFIDENCE) / 2)

    def beyond(distance: float, half: float) -> float:
        if half <= 0:
            return 0.0 if distance > 0 else 1.0
        return float(norm.sf(distance / half * quantile))

    below = beyond(interval.estimate + margin, interval.estimate - interval.low)
    above = beyond(margin - interval.estimate, interval.high - interval.estimate)
    return max(below, above) if two_sided else below


# --- parts of an interval -------------------------------------------------------------------------


def _groups(strata: Sequence[Stratum]) -> list[np.ndarray]:
    """Group the videos by the strata that contain them; each group is [strata, 2, videos], sums and
    counts, 0 in strata without the video."""
    members: dict[tuple[int, ...], list[Hashable]] = defaultdict(list)
    for video in dict.fromkeys(video for stratum in strata for video in stratum):
        members[tuple(i for i, stratum in enumerate(strata) if video in stratum)].append(video)
    return [
        np.array([[s.get(v, (0.0, 0.0)) for v in videos] for s in strata]).transpose(0, 2, 1)
        for videos in members.values()
    ]


def _ratios(group: np.ndarray) -> np.ndarray:
    """Scores by stratum and video, in the strata that contain the group's videos."""
    sums, counts = group[group[:, 1].any(axis=-1)].transpose(1, 0, 2)
    return sums / counts


def _mean_ratio(totals: np.ndarray) -> np.ndarray:
    """totals: [strata, 2, ...] -> [...]."""
    return (totals[:, 0] / totals[:, 1]).mean(axis=0)


def _resampled(
    groups: Sequence[np.ndarray], totals: np.ndarray, resamples: int
) -> tuple[float, float]:
    """Percentiles over resamples of the groups' videos, relative to the estimate."""
    fixed = totals - sum(group.sum(axis=-1) for group in groups)

    def statistic(*picks: np.ndarray, axis: int = -1) -> np.ndarray:
        drawn = [g[..., pick].sum(axis=axis) for g, pick in zip(groups, picks, strict=True)]
        return _mean_ratio(sum(drawn) + fixed.reshape(*fixed.shape, *[1] * (drawn[0].ndim - 2)))

    # Indices are resampled, so all numbers of a video stay together.
    interval = bootstrap(
        [np.arange(group.shape[-1]) for group in groups],
        statistic,
        paired=False,
        vectorized=True,
        confidence_level=CONFIDENCE,
        n_resamples=resamples,
        method="percentile",
        batch=256,
        rng=np.random.default_rng(0),
    ).confidence_interval
    estimate = _mean_ratio(totals)
    return float(interval.low - estimate), float(interval.high - estimate)


def _small_sample(
    groups: Sequence[np.ndarray], totals: np.ndarray, scale: Bounds | None
) -> tuple[float, float]:
    """Bounds, relative to the estimate, from the variance of the linearized estimate, with
    Welch-Satterthwaite degrees of freedom over the groups."""
    ratios = totals[:, :1] / totals[:, 1:]
    variances, freedoms = [], []
    for group in groups:
        videos = group.shape[-1]
        influence = ((group[:, 0] - ratios * group[:, 1]) / totals[:, 1:]).mean(axis=0)
        variances.append(videos * influence.var(ddof=1))
        freedoms.append(videos - 1)
    variance = sum(variances)
    if not variance:
        return 0.0, 0.0
    freedom = variance**2 / sum(v**2 / f for v, f in zip(variances, freedoms, strict=True))
    quantile = t.isf(_TAIL, freedom)
    half = float(quantile) * math.sqrt(variance)
    if scale is None:
        return -half, half
    width = scale[1] - scale[0]
    rate = (float(ratios.mean()) - scale[0]) / width
    effective = rate * (1 - rate) * width**2 / variance * (norm.isf(_TAIL) / quantile) ** 2
    hits, misses = effective * rate, effective * (1 - rate)
    return (
        float(beta.ppf(_TAIL, hits, misses + 1) - rate) * width,
        float(beta.isf(_TAIL, hits + 1, misses) - rate) * width,
    )


def _missed(group: np.ndarray, totals: np.ndarray, scale: Bounds) -> tuple[float, float]:
    """How far the estimate may exceed or miss the truth if a group's videos are all equal."""
    fraction = 1 - _TAIL ** (1 / group.shape[-1])
    own = group.sum(axis=-1)
    inside = own[:, 1] > 0
    weights = own[inside, 1] / totals[inside, 1] / len(totals)
    scores = own[inside, 0] / own[inside, 1]
    below, above = (fraction * weights * abs(scores - end) for end in scale)
    return float(below.sum()), float(above.sum())


def _positive(margin: float) -> float:
    if not margin > 0:
        raise ConfigError(f"margin must be positive, got {margin}")
    return margin


def _checked(*columns: Sequence[float]) -> list[np.ndarray]:
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    if len({len(array) for array in arrays}) != 1:
        lengths = " and ".join(str(len(array)) for array in arrays)
        raise ConfigError(f"paired scores differ in length: {lengths}; score the same examples")
    if len(arrays[0]) == 0 or any(np.isnan(array).any() for array in arrays):
        raise ConfigError("scores are empty or contain NaN; score every example")
    return arrays
