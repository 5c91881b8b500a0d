"""Which rank directions of a generated adapter matter (paper Appendix C, Table 5).

Directions are scored per layer and module by the norm product ‖A_r‖·‖B_r‖; the shared bias adapter
stays in force throughout, so k = 0 is the bias alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from v2l_fast.analysis.examples import (
    Example,
    Metric,
    Progress,
    answer_scores,
    control_scores,
    interval,
    silent,
)
from v2l_fast.errors import ConfigError
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.model import Video2LoRA

BUDGETS = (1, 2, 4, 8, 16)
SEEDS = (0, 1, 2)
STRATEGIES = ("top", "bottom", "random", "remove-top")


def kept_directions(
    strategy: str, k: int, rank: int, seeds: Sequence[int] = SEEDS
) -> list[tuple[int, str, int]]:
    """``Adapter.prune`` arguments of a strategy at budget k: one, or one for each random seed.

    Removing the k highest keeps the rank - k lowest.
    """
    keep = rank - k if strategy == "remove-top" else k
    if keep in (0, rank):
        # One choice, whatever the strategy.
        return [(keep, "norm", 0)]
    if strategy == "random":
        return [(keep, "random", seed) for seed in seeds]
    return [(keep, "norm" if strategy == "top" else "bottom", 0)]


def rank_ablation(
    model: Video2LoRA,
    examples: Sequence[Example],
    adapters: Sequence[Adapter],
    metric: Metric,
    budgets: Sequence[int] = BUDGETS,
    seeds: Sequence[int] = SEEDS,
    max_new_tokens: int = 128,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Scores of answers through pruned adapters.

    Args:
        adapters: each example's, all of one generated rank.
        budgets: values of k; those above the generated rank are left out, 0 and the rank are
            always there.

    Returns:
        "rank", "examples", "seeds", "controls" (condition -> interval, see
        :func:`~v2l_fast.analysis.examples.control_scores`) and "rows": for each k a dict of
        strategy -> interval over videos (random: over the mean of its seeds).

    Raises:
        ConfigError: adapters of several ranks.
    """
    ranks = {adapter.rank for adapter in adapters}
    if len(ranks) != 1:
        raise ConfigError(f"rank ablation needs adapters of one rank, not {sorted(ranks)}")
    (rank,) = ranks
    ks = sorted({0, rank, *(k for k in budgets if 0 < k < rank)})
    plan = {(k, s): kept_directions(s, k, rank, seeds) for k in ks for s in STRATEGIES}
    distinct = list(dict.fromkeys(choice for choices in plan.values() for choice in choices))
    scores: dict[tuple[int, str, int], list[float]] = {}
    for done, choice in enumerate(distinct):
        progress("answering through pruned adapters", done, len(distinct))
        pruned = {id(a): a.prune(*choice) for a in adapters}
        chosen = [pruned[id(a)] for a in adapters]
        scores[choice] = answer_scores(model, examples, chosen, metric, max_new_tokens)
    progress("answering through pruned adapters", len(distinct), len(distinct))
    rows = []
    for k in ks:
        row: dict[str, Any] = {"k": k}
        for strategy in STRATEGIES:
            runs = [scores[choice] for choice in plan[k, strategy]]
            means = [sum(run) / len(run) for run in zip(*runs, strict=True)]
            row[strategy] = interval(means, examples)
        rows.append(row)
    controls = control_scores(model, examples, adapters, metric, max_new_tokens)
    return {
        "rank": rank,
        "examples": len(examples),
        "seeds": list(seeds),
        "controls": {name: interval(values, examples) for name, values in controls.items()},
        "rows": rows,
    }
