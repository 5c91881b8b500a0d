"""The judge over an evaluation's answers: scores of every condition, and pairs as an audit.

Responsible for what is sent to the judge; requests and their failures are `judge`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from v2l_fast.data.manifest import Example
from v2l_fast.evaluation.answering import BASELINE, SYSTEM
from v2l_fast.evaluation.judge import Judge, Preference
from v2l_fast.evaluation.rubrics import Task

Progress = Callable[[str, int, int], None]


def judge_all(
    judge: Judge,
    examples: Sequence[Example],
    answers: Mapping[str, Mapping[str, str]],
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """Scores by condition; an example whose judgment failed has none there."""
    asked = [(name, e) for name, texts in answers.items() for e in examples if e.id in texts]
    verdicts = judge.score(
        [_task(e) for _, e in asked],
        [answers[name][e.id] for name, e in asked],
        lambda done, total: progress("judging", done, total),
    )
    scores: dict[str, dict[str, float]] = {name: {} for name in answers}
    for (name, example), verdict in zip(asked, verdicts, strict=True):
        if verdict.score is not None:
            scores[name][example.id] = verdict.score
    return scores


def judge_pairs(
    judge: Judge,
    examples: Sequence[Example],
    answers: Mapping[str, Mapping[str, str]],
    progress: Progress,
) -> dict[str, Any]:
    """How often system, baseline or neither is preferred, and both mean scores."""
    system, baseline = answers[SYSTEM], answers[BASELINE]
    shared = [e for e in examples if e.id in system and e.id in baseline]
    found = judge.compare(
        [_task(e) for e in shared],
        [system[e.id] for e in shared],
        [baseline[e.id] for e in shared],
        progress=lambda done, total: progress("judging pairs", done, total),
    )
    kept = [p for p in found if isinstance(p, Preference)]
    return {
        "pairs": len(kept),
        "failed": len(found) - len(kept),
        "system_preferred": sum(p.preferred == 1 for p in kept),
        "ties": sum(p.preferred == 0 for p in kept),
        "baseline_preferred": sum(p.preferred == -1 for p in kept),
        "system": _mean([p.first for p in kept]),
        "baseline": _mean([p.second for p in kept]),
    }


def _task(example: Example) -> Task:
    return Task(example.prompt, example.target_text, example.is_caption)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
