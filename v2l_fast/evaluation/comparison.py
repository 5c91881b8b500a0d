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
from v2l_fast.evaluation.statistics import Interval, mean_of_ratios, recovery

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
        margin: of equivalence and non-inferiority.
    """

    examples: int
    videos: int
    baseline: float
    system: float
    difference: Interval
    margin: float

    @property
    def equivalent(self) -> bool:
        return self.difference.equivalent(self.margin)

    @property
    def non_inferior(self) -> bool:
        return self.difference.non_inferior(self.margin)

    def as_json(self) -> dict[str, Any]:
        """Everything for a machine; the recovery of a zero baseline is null."""
        kept = recovery(self.system, self.baseline)
        return {
            "examples": self.examples,
            "videos": self.videos,
            "baseline": self.baseline,
            "system": self.system,
            "difference": self.difference.estimate,
            "low": self.difference.low,
            "high": self.difference.high,
            "recovery": kept if math.isfinite(kept) else None,
            "margin": self.margin,
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
        difference=mean_of_ratios(strata),
        margin=margin,
    )


def _per_video(
    ids: Sequence[str], system: Scores, baseline: Scores, videos: Mapping[str, str]
) -> tuple[list[float], list[float]]:
    """Sum of differences and number of examples of each video."""
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
    for id_ in ids:
        sums[videos[id_]] += system[id_] - baseline[id_]
        counts[videos[id_]] += 1
    return list(sums.values()), list(counts.values())
