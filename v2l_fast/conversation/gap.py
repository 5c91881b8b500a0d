"""The persona knowledge gap of CPER (Baskar et al., NAACL-SRW 2025) and a gap that counts facts.

Pure functions on float64 arrays: no model, no text. Vectors are rows of an encoder's output; only
their direction matters.

The paper's gap measures how ambiguous the readings of a user are and how little they agree with the
earlier ones. It does not measure what is missing: it also falls when a user adds nothing, because a
persona that never changes agrees with itself. :func:`slot_gap` counts what the user has stated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def uncertainty(candidates: Sequence[ArrayLike | None]) -> float:
    """Mean pairwise cosine dissimilarity of n sampled readings.

    Args:
        candidates: n vectors [d]; None for a reading without text.

    Returns:
        0 (all equal) to n / (n - 1). 1 with fewer than two candidates or a missing one, as in the
        released code.
    """
    n = len(candidates)
    if n < 2 or any(candidate is None for candidate in candidates):
        return 1.0
    rows = unit_rows(np.asarray(candidates, np.float64))
    total = rows.sum(0)
    return float(1.0 - (total @ total - (rows * rows).sum()) / (n * (n - 1)))


def semantic_uncertainty(candidates: Sequence[ArrayLike | None], similarity: float = 0.9) -> float:
    """Entropy of the meanings of n sampled readings over ``ln n``: 0 (one meaning) to 1 (n).

    Readings have one meaning if their cosine is at least ``similarity``; there is no entailment
    model. The conventions are those of :func:`uncertainty`.
    """
    n = len(candidates)
    if n < 2 or any(candidate is None for candidate in candidates):
        return 1.0
    rows = unit_rows(np.asarray(candidates, np.float64))
    first: list[int] = []
    labels = []
    for index, row in enumerate(rows):
        equal = [label for label, i in enumerate(first) if row @ rows[i] >= similarity]
        if not equal:
            first.append(index)
        labels.append(equal[0] if equal else len(first) - 1)
    return cluster_entropy(labels) / math.log(n)


def spectral_uncertainty(candidates: Sequence[ArrayLike | None]) -> float:
    """:func:`spectral_count` of the cosines of n sampled readings, scaled to 0 (equal) to 1
    (orthogonal). The conventions are those of :func:`uncertainty`."""
    n = len(candidates)
    if n < 2 or any(candidate is None for candidate in candidates):
        return 1.0
    rows = unit_rows(np.asarray(candidates, np.float64))
    similarity = np.clip(rows @ rows.T, 0.0, 1.0)
    np.fill_diagonal(similarity, 1.0)
    return (spectral_count(similarity) - 1.0) / (n - 1)


UNCERTAINTIES: Mapping[str, Callable[[Sequence[ArrayLike | None]], float]] = {
    "cosine": uncertainty,
    "semantic": semantic_uncertainty,
    "spectral": spectral_uncertainty,
}


def alignment(persona: ArrayLike | None, history: ArrayLike, temperature: float = 1.0) -> float:
    """Cosine of a persona and its attention-weighted history: the paper's WCMI.

    Args:
        persona: [d], of the current turn; None if the turn has no facts.
        history: [m, d], one row for each earlier turn.
        temperature: of the softmax over cosines; 1 in the paper.

    Returns:
        -1 to 1; 0 without history, without a persona, or if the history cancels out.
    """
    rows = np.asarray(history, np.float64)
    if persona is None or rows.size == 0:
        return 0.0
    rows = unit_rows(rows)
    current = unit_rows(np.asarray(persona, np.float64)[None])[0]
    weights = attention(current, rows, temperature)
    attended = weights @ rows
    norm = float(np.linalg.norm(attended))
    if norm < 1e-12:
        return 0.0
    return float(np.clip(current @ attended / norm, -1.0, 1.0))


def attention(persona: ArrayLike, history: ArrayLike, temperature: float = 1.0) -> Array:
    """Softmax over the cosines of ``persona`` [d] and the rows of ``history`` [m, d]: [m]."""
    rows = unit_rows(np.asarray(history, np.float64))
    cosines = rows @ unit_rows(np.asarray(persona, np.float64)[None])[0] / temperature
    weights = np.exp(cosines - cosines.max())
    return weights / weights.sum()


def knowledge_gap(
    uncertainty: float,
    alignment: float,
    alpha: float = 0.5,
    beta: float = 0.5,
    conflict: float = 0.0,
    gamma: float = 0.0,
) -> float:
    """``1 + alpha * uncertainty - beta * alignment + gamma * conflict``.

    The paper has no conflict term (``gamma=0``). Cosine alignment is blind to polarity: "prefers
    long answers" agrees with "prefers short answers" more than a paraphrase does.
    """
    return 1.0 + alpha * uncertainty - beta * alignment + gamma * conflict


def normalized_gap(gap: float, alpha: float = 0.5, beta: float = 0.5) -> float:
    """Scale a gap: 0 means that nothing is missing, 1 is uncertainty 1 without alignment."""
    return (gap - (1.0 - beta)) / (alpha + beta)


@dataclass(frozen=True)
class SlotCoverage:
    """What a persona lacks of a schema.

    Attributes:
        gap: ``1 + alpha * entropy - beta * coverage``, on the scale of the paper's gap.
        coverage: weight of the slots that the user has stated, 0 to 1.
        entropy: weighted entropy of the readings of the slots that are not stated, 0 to 1.
        missing: slot name -> how informative a question about it would be, 0 to 1; 0 for a stated
            slot.
    """

    gap: float
    coverage: float
    entropy: float
    missing: Mapping[str, float]


def slot_gap(
    weights: Mapping[str, float],
    sizes: Mapping[str, int | None],
    supported: Sequence[str],
    readings: Sequence[Mapping[str, str]],
    alpha: float = 0.5,
    beta: float = 0.5,
) -> SlotCoverage:
    """Coverage by facts that the user stated, ranked by how far the readings disagree.

    A confident guess is still a guess: a slot that is not stated misses at least one half.

    Args:
        weights: slot name -> its weight, at least 0.
        sizes: slot name -> number of its values, None if any text is allowed.
        supported: names of the slots that an active, stated fact fills.
        readings: n of them, slot name -> value; a reading may leave slots out.
    """
    total = sum(weights.values())
    if total <= 0:
        return SlotCoverage(1.0 - beta, 1.0, 0.0, dict.fromkeys(weights, 0.0))
    stated = set(supported)
    missing, coverage, entropy = {}, 0.0, 0.0
    for name, weight in weights.items():
        if name in stated:
            coverage += weight
            missing[name] = 0.0
            continue
        spread = value_entropy([reading.get(name) for reading in readings], sizes.get(name))
        entropy += weight * spread
        missing[name] = 0.5 + 0.5 * spread
    coverage, entropy = coverage / total, entropy / total
    return SlotCoverage(1.0 + alpha * entropy - beta * coverage, coverage, entropy, missing)


def value_entropy(values: Sequence[str | None], size: int | None = None) -> float:
    """Entropy of n values, normalized to 0 to 1 by ``ln(min(n, size))``.

    Args:
        values: None counts as a value of its own: a reading that does not know.
        size: number of possible values; None if any text is allowed.
    """
    n = len(values)
    most = n if size is None else min(n, size)
    if most < 2:
        return 0.0
    return min(1.0, cluster_entropy([_rank(values, value) for value in values]) / math.log(most))


def cluster_entropy(labels: Sequence[int]) -> float:
    """Discrete semantic entropy in nats of n samples by the cluster each belongs to
    (Kuhn et al., 2023)."""
    counts = np.unique(np.asarray(labels), return_counts=True)[1] / len(labels)
    return float(-(counts * np.log(counts)).sum())


def split_reward(share: float) -> float:
    """Information of a yes-or-no question that ``share`` of the candidates answer with yes: its
    entropy in bits, less for uneven splits (Uncertainty of Thoughts, Hu et al., 2024)."""
    if not 0.0 < share < 1.0:
        return 0.0
    entropy = -share * math.log2(share) - (1.0 - share) * math.log2(1.0 - share)
    return entropy / (1.0 + abs(2.0 * share - 1.0) / 0.4)


def best_split(values: Sequence[str | None]) -> str | None:
    """The value that is best to ask about with a yes-or-no question, by :func:`split_reward` of its
    share of the readings; None if no value splits them."""
    shares = {v: values.count(v) / len(values) for v in values if v is not None}
    best = max(sorted(shares), key=lambda v: split_reward(shares[v]), default=None)
    return best if best is not None and split_reward(shares[best]) > 0 else None


def spectral_count(similarity: ArrayLike) -> float:
    """A continuous number of distinct samples: the sum of ``max(0, 1 - eigenvalue)`` of the
    normalized Laplacian of a similarity matrix [n, n] (Lin et al., 2023). n equal samples give 1,
    n orthogonal ones n."""
    matrix = np.asarray(similarity, np.float64)
    scale = 1.0 / np.sqrt(matrix.sum(1))
    normalized = matrix * scale[:, None] * scale[None]
    return float(np.clip(np.linalg.eigvalsh(normalized), 0.0, None).sum())


def unit_rows(rows: Array) -> Array:
    """Rows [n, d] divided by their norms; a row of zeros stays as it is."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


def _rank(values: Sequence[str | None], value: str | None) -> int:
    return list(values).index(value)
