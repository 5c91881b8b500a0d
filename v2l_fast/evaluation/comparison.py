"""A system against its baseline on the same examples: means, paired difference, the paper's marks.

Responsible for the numbers of a table row. What is compared, and how a table looks, is `report`'s.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from v2l_fast.errors import ConfigError
from v2l_fast.evaluation.statistics import (
    DIFFERENCES,
    Interval,
    Stratum,
    mean_of_ratios,
    recovery,
    required_videos,
)

# Section 4.3 of the paper; exact match is a token metric too and takes token-F1's.
MARGINS = {"token_f1": 0.05, "exact_match": 0.05, "judge": 0.15}

Scores = Mapping[str, float]


@dataclass(frozen=True)
class Comparison:
    """A row: both systems' means and what their paired difference allows to claim.

    Attributes:
        examples, videos: counted where both systems have a score.
        baseline, system: mean scores over those examples.
        difference: system - baseline with its 95% interval; examples of one video are resampled
            together, since their scores are not independent.
        margin: of equivalence and non-inferiority, neither of which holds on fewer videos than
            :func:`~v2l_fast.evaluation.statistics.required_videos`.
    """

    examples: int
    videos: int
    baseline: float
    system: float
    difference: Interval
    margin: float

    @property
    def enough(self) -> bool:
        """Whether there are enough videos to claim anything at the margin."""
        return self.videos >= required_videos(self.margin)

    @property
    def equivalent(self) -> bool:
        return self.enough and self.difference.equivalent(self.margin)

    @property
    def non_inferior(self) -> bool:
        return self.enough and self.difference.non_inferior(self.margin)

    def as_json(self, chance: float | None = None) -> dict[str, Any]:
        """Everything for a machine.

        Args:
            chance: the score without video and adapter on the same examples.

        Returns:
            The fields, with "recovery", system / baseline (null of a zero baseline), and "kept",
            (system - chance) / (baseline - chance) (null without chance or a baseline above it).
        """
        ratio = recovery(self.system, self.baseline)
        kept = math.nan if chance is None else recovery(self.system, self.baseline, chance)
        return {
            "examples": self.examples,
            "videos": self.videos,
            "baseline": self.baseline,
            "system": self.system,
            "difference": self.difference.estimate,
            "low": self.difference.low,
            "high": self.difference.high,
            "recovery": ratio if math.isfinite(ratio) else None,
            "kept": kept if math.isfinite(kept) else None,
            "margin": self.margin,
            "enough": self.enough,
            "equivalent": self.equivalent,
            "non_inferior": self.non_inferior,
        }


def compare(
    system: Scores, baseline: Scores, videos: Mapping[str, str], margin: float
) -> Comparison:
    """Compare on the examples that both have scored.

    Args:
        system, baseline: score by example id; a missing id is an example without a score.
        videos: the video of each example id.

    Raises:
        ConfigError: the two share no example.
    """
    return average([(system, baseline)], videos, margin)


def average(
    rows: Sequence[tuple[Scores, Scores]], videos: Mapping[str, str], margin: float
) -> Comparison:
    """The mean of several rows, given as (system, baseline) scores; every row weighs the same.

    Videos that are in several rows are resampled in all of them together.

    Raises:
        ConfigError: a row's two systems share no example.
    """
    shared = [[id_ for id_ in system if id_ in baseline] for system, baseline in rows]
    if not all(shared):
        raise ConfigError("the two systems share no scored example; nothing can be compared")
    strata, means = [], []
    for ids, (system, baseline) in zip(shared, rows, strict=True):
        strata.append(_per_video(ids, system, baseline, videos))
        means.append([sum(scores[id_] for id_ in ids) / len(ids) for scores in (system, baseline)])
    return Comparison(
        examples=sum(len(ids) for ids in shared),
        videos=len({videos[id_] for ids in shared for id_ in ids}),
        baseline=sum(baseline for _, baseline in means) / len(means),
        system=sum(system for system, _ in means) / len(means),
        difference=mean_of_ratios(strata, bounds=DIFFERENCES),
        margin=margin,
    )


def pooled(
    rows: Sequence[tuple[Scores, Scores]], videos: Mapping[str, str], margin: float
) -> Comparison:
    """All examples of several rows as one, so that every example weighs the same: what the judge's
    "Average" row of the paper's Table 4 is, where its other averages weigh rows equally.

    Raises:
        ConfigError: the two systems share no example.
    """
    system, baseline = ({k: v for row in rows for k, v in row[side].items()} for side in (0, 1))
    return average([(system, baseline)], videos, margin)


def _per_video(
    ids: Sequence[str], system: Scores, baseline: Scores, videos: Mapping[str, str]
) -> Stratum:
    """Sum of differences and number of examples of each video."""
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
    for id_ in ids:
        sums[videos[id_]] += system[id_] - baseline[id_]
        counts[videos[id_]] += 1
    return {video: (total, counts[video]) for video, total in sums.items()}
