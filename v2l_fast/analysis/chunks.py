"""Adapters composed of a video's chunks against the adapter of the whole (paper Section 5.6).

Chunks are internalized each on its own and joined in rank, the bias adapter once. A network without
``chunk_position`` was never told of chunks: its composition is zero-shot.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from v2l_fast.analysis.examples import (
    NONE,
    Example,
    Metric,
    Progress,
    answer_scores,
    control_scores,
    internalize_each,
    interval,
    silent,
)
from v2l_fast.errors import ConfigError
from v2l_fast.model import Video2LoRA

COUNTS = (1, 2, 4, 8, 16)


def compare_chunks(
    model: Video2LoRA,
    examples: Sequence[Example],
    metric: Metric,
    counts: Sequence[int] = COUNTS,
    max_new_tokens: int = 128,
    progress: Progress = silent,
    **options: Any,
) -> dict[str, Any]:
    """Answers through adapters of 1 to 16 chunks.

    Args:
        counts: numbers of chunks; 1, the single adapter, is always there.
        **options: of ``Video2LoRA.internalize``; frames are those of each chunk.

    Returns:
        "examples", "chunk_position", "controls" (condition -> kind -> interval, with the single
        adapters) and "rows": for each count "chunks", "rank" (generated), "score", kind ->
        interval; "change", kind -> interval of the difference to the single adapter; "kept", kind
        -> share of the single adapter's mean score above that without an adapter (absent where it
        is not above).

    Raises:
        ConfigError: a count below 1.
    """
    # Scipy is slow to import and not needed for help.
    from v2l_fast.evaluation.statistics import recovery

    if any(count < 1 for count in counts):
        raise ConfigError(f"chunks must be at least 1, not {min(counts)}")
    kinds = list(dict.fromkeys(example.kind for example in examples))
    members = {kind: [e for e in examples if e.kind == kind] for kind in kinds}

    def by_kind(scores: Sequence[float]) -> dict[str, list[float]]:
        paired = list(zip(scores, examples, strict=True))
        return {kind: [s for s, e in paired if e.kind == kind] for kind in kinds}

    single: dict[str, list[float]] = {}
    controls: dict[str, list[float]] = {}
    none: dict[str, float] = {}
    rows = []
    for count in sorted({1, *counts}):
        adapters = internalize_each(model, examples, progress, chunks=count, **options)
        scores = by_kind(answer_scores(model, examples, adapters, metric, max_new_tokens))
        if count == 1:
            single = scores
            controls = control_scores(model, examples, adapters, metric, max_new_tokens)
            none = {kind: fmean(values) for kind, values in by_kind(controls[NONE]).items()}
        rows.append(
            {
                "chunks": count,
                "rank": adapters[0].rank,
                "score": {kind: interval(values, members[kind]) for kind, values in scores.items()},
                "change": {
                    kind: interval(
                        [a - b for a, b in zip(values, single[kind], strict=True)],
                        members[kind],
                        (-1.0, 1.0),
                    )
                    for kind, values in scores.items()
                },
                "kept": {
                    kind: recovery(fmean(values), fmean(single[kind]), none[kind])
                    for kind, values in scores.items()
                    if fmean(single[kind]) > none[kind]
                },
            }
        )
    return {
        "examples": len(examples),
        "chunk_position": model.config.chunk_position,
        "controls": {
            name: {
                kind: interval(values, members[kind]) for kind, values in by_kind(scores).items()
            }
            for name, scores in controls.items()
        },
        "rows": rows,
    }
