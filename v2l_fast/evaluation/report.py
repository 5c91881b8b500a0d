"""What an evaluation found: scores by benchmark and subset, controls beside them, one table.

Responsible for turning scores into the JSON record and the Markdown table (the layout of the
paper's Tables 1 to 4 with the controls added). Numbers of a row are `comparison`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from v2l_fast.data.manifest import Example
from v2l_fast.evaluation.answering import BASELINE, NONE, SYSTEM
from v2l_fast.evaluation.comparison import MARGINS, Comparison, Scores, average, compare, pooled
from v2l_fast.evaluation.metrics import exact_match, token_f1
from v2l_fast.evaluation.statistics import Interval, holm

TITLES = {"token_f1": "Token-F1", "exact_match": "Exact match", "judge": "LLM judge"}

# condition -> score by example id
ConditionScores = Mapping[str, Scores]


def text_scores(
    examples: Sequence[Example], answers: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Token-F1 of every answer and, of answers to questions, exact match.

    Args:
        answers: condition -> example id -> text.

    Returns:
        metric -> condition -> example id -> score.
    """
    metrics: dict[str, tuple[Callable[[str, str], float], list[Example]]] = {
        "token_f1": (token_f1, list(examples)),
        "exact_match": (exact_match, [e for e in examples if not e.is_caption]),
    }
    return {
        name: {
            condition: {e.id: metric(texts[e.id], e.target_text) for e in scored if e.id in texts}
            for condition, texts in answers.items()
        }
        for name, (metric, scored) in metrics.items()
        if scored
    }


def summarize(
    examples: Sequence[Example],
    videos: Mapping[str, str],
    scores: Mapping[str, ConditionScores],
) -> dict[str, Any]:
    """The record of all metrics: metric -> {"margin", "rows"}.

    A row is a benchmark, one of its subsets (``metadata["subset"]``, where there are several) or,
    where there are several benchmarks, their average with equal weights ("Average") and that of all
    their examples ("Pooled"). It holds :meth:`Comparison.as_json`, the controls' means over the
    same examples, and "equivalent_holm" and "non_inferior_holm", which marks hold together with
    those of the metric's other rows (Holm's procedure).

    Args:
        videos: the video of each example id.
    """
    return {
        metric: {
            "margin": MARGINS[metric],
            "rows": _rows(examples, videos, by_condition, MARGINS[metric]),
        }
        for metric, by_condition in scores.items()
    }


def _rows(
    examples: Sequence[Example],
    videos: Mapping[str, str],
    scores: ConditionScores,
    margin: float,
) -> list[dict[str, Any]]:
    rows, whole = [], []
    for dataset in dict.fromkeys(e.dataset for e in examples):
        members = [e for e in examples if e.dataset == dataset]
        picked = _pick(members, scores)
        if picked is None:
            continue
        whole.append(picked)
        rows.append(_row(dataset, None, picked, videos, margin))
        subsets = list(dict.fromkeys(e.metadata.get("subset") for e in members))
        if len(subsets) > 1:
            for subset in subsets:
                part = _pick([e for e in members if e.metadata.get("subset") == subset], scores)
                if part is not None:
                    rows.append(_row(dataset, str(subset), part, videos, margin))
    if len(whole) > 1:
        pairs = [(picked[SYSTEM], picked[BASELINE]) for picked in whole]
        shared = [n for n in _controls(whole[0]) if all(picked.get(n) for picked in whole)]
        means = {n: sum(_mean(picked[n]) for picked in whole) / len(whole) for n in shared}
        rows.append(_json("Average", None, average(pairs, videos, margin), means))
        everything = {
            n: _mean({k: v for picked in whole for k, v in picked[n].items()}) for n in shared
        }
        rows.append(_json("Pooled", None, pooled(pairs, videos, margin), everything))
    intervals = [Interval(row["difference"], row["low"], row["high"]) for row in rows]
    for name, two_sided in (("equivalent", True), ("non_inferior", False)):
        together = holm(intervals, margin, two_sided)
        for row, holds in zip(rows, together, strict=True):
            row[f"{name}_holm"] = row[name] and holds
    return rows


def _pick(examples: Sequence[Example], scores: ConditionScores) -> dict[str, Scores] | None:
    """Scores of the examples that baseline and system both have; None without any."""
    shared = [e.id for e in examples if e.id in scores[BASELINE] and e.id in scores[SYSTEM]]
    if not shared:
        return None
    return {
        name: {id_: by_id[id_] for id_ in shared if id_ in by_id} for name, by_id in scores.items()
    }


def _row(
    dataset: str,
    subset: str | None,
    scores: Mapping[str, Scores],
    videos: Mapping[str, str],
    margin: float,
) -> dict[str, Any]:
    controls = {name: _mean(scores[name]) for name in _controls(scores) if scores[name]}
    found = compare(scores[SYSTEM], scores[BASELINE], videos, margin)
    return _json(dataset, subset, found, controls)


def _json(
    dataset: str, subset: str | None, found: Comparison, controls: Mapping[str, float]
) -> dict[str, Any]:
    return {
        "benchmark": dataset,
        "subset": subset,
        **found.as_json(controls.get(NONE)),
        "controls": dict(controls),
    }


def _controls(scores: Mapping[str, Scores]) -> list[str]:
    return [name for name in scores if name not in (BASELINE, SYSTEM)]


def _mean(scores: Scores) -> float:
    return sum(scores.values()) / len(scores)


# --- Markdown -------------------------------------------------------------------------------------


def markdown(summary: Mapping[str, Any], notes: Sequence[str] = ()) -> str:
    """One table a metric, then the notes as a list."""
    parts = [_table(metric, found) for metric, found in summary.items()]
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def _table(metric: str, found: Mapping[str, Any]) -> str:
    controls = list(dict.fromkeys(name for row in found["rows"] for name in row["controls"]))
    head = ["Benchmark", "n", "Base", "V2L", "Δ", "95% CI", "Eq", "NI"]
    head += ["kept above chance", *controls]
    lines = [
        f"**{TITLES[metric]}** (margin {found['margin']})",
        "",
        "| " + " | ".join(head) + " |",
        "|---" + "|---:" * (len(head) - 1) + "|",
    ]
    for row in found["rows"]:
        name = row["benchmark"] if row["subset"] is None else f"· {row['subset']}"
        kept = "–" if row["kept"] is None else f"{row['kept']:.1%}"
        cells = [
            name.replace("|", "\\|"),
            str(row["examples"]),
            f"{row['baseline']:.3f}",
            f"{row['system']:.3f}",
            f"{row['difference']:+.3f}",
            f"[{row['low']:+.3f}, {row['high']:+.3f}]",
            mark(row, "equivalent"),
            mark(row, "non_inferior"),
            kept,
            *(f"{row['controls'][n]:.3f}" if n in row["controls"] else "–" for n in controls),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mark(row: Mapping[str, Any], criterion: str) -> str:
    """The paper's mark of a row's criterion, in parentheses where it holds alone but not together
    with those of the table's other rows; "few" where there are too few videos to claim anything."""
    if not row["enough"]:
        return "few"
    if not row[criterion]:
        return "–"
    return "Y" if row[f"{criterion}_holm"] else "(Y)"
