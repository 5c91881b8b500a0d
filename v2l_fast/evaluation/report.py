"""Results of an evaluation: comparisons by benchmark and subset, controls, tables.

Responsible for turning scores into the rows of the paper's Tables 1 to 4 (system against baseline,
paired difference, marks) with the controls added, as a JSON record and as Markdown. Intervals are
`statistics`'s.
"""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v2l_fast.data.manifest import Example
from v2l_fast.errors import ConfigError
from v2l_fast.evaluation.answers import BASELINE, NONE, SYSTEM
from v2l_fast.evaluation.examples import exact_match, token_f1
from v2l_fast.evaluation.statistics import (
    DIFFERENCES,
    Interval,
    Stratum,
    holm,
    mean_of_ratios,
    recovery,
    required_videos,
)
from v2l_fast.files import write_text

# Section 4.3 of the paper; exact match is also a token metric and uses token-F1's margin.
MARGINS = {"token_f1": 0.05, "exact_match": 0.05, "judge": 0.15}

Scores = Mapping[str, float]


@dataclass(frozen=True)
class Comparison:
    """System against baseline on the examples that both have a score for.

    Attributes:
        examples, videos: number of those examples and of their videos.
        baseline, system: mean scores.
        difference: system - baseline with its 95% interval; examples about one video are resampled
            together because their scores are not independent.
        margin: of equivalence and non-inferiority. Neither is claimed on fewer videos than
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
        """Whether there are enough videos for a claim at the margin."""
        return self.videos >= required_videos(self.margin)

    @property
    def equivalent(self) -> bool:
        return self.enough and self.difference.equivalent(self.margin)

    @property
    def non_inferior(self) -> bool:
        return self.enough and self.difference.non_inferior(self.margin)

    def as_json(self, chance: float | None = None) -> dict[str, Any]:
        """The fields, properties and ratios as JSON values.

        Args:
            chance: score without video and adapter on the same examples.

        Returns:
            Also "recovery", system / baseline (null for a zero baseline), and "kept",
            (system - chance) / (baseline - chance) (null without chance, or if the baseline is not
            above it).
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
    """Compare two systems on the examples that both have a score for.

    Args:
        system, baseline: example id -> score.
        videos: example id -> video.

    Raises:
        ConfigError: the two share no example.
    """
    return average([(system, baseline)], videos, margin)


def average(
    rows: Sequence[tuple[Scores, Scores]], videos: Mapping[str, str], margin: float
) -> Comparison:
    """The mean of several rows of (system, baseline) scores, each row with the same weight.

    A video in several rows is resampled in all of them together.

    Raises:
        ConfigError: the two systems of a row share no example.
    """
    shared = [[id_ for id_ in system if id_ in baseline] for system, baseline in rows]
    if not all(shared):
        raise ConfigError("the two systems share no scored example; score the same examples")
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
    """All examples of several rows as one row, each example with the same weight, as in the judge's
    "Average" row of the paper's Table 4; the paper's other averages weight rows equally.

    Raises:
        ConfigError: the two systems share no example.
    """
    system, baseline = ({k: v for row in rows for k, v in row[side].items()} for side in (0, 1))
    return average([(system, baseline)], videos, margin)


def _per_video(
    ids: Sequence[str], system: Scores, baseline: Scores, videos: Mapping[str, str]
) -> Stratum:
    """Video -> (sum of differences, number of examples)."""
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
    for id_ in ids:
        sums[videos[id_]] += system[id_] - baseline[id_]
        counts[videos[id_]] += 1
    return {video: (total, counts[video]) for video, total in sums.items()}


# --- report ---------------------------------------------------------------------------------------


TITLES = {"token_f1": "Token-F1", "exact_match": "Exact match", "judge": "LLM judge"}

# condition -> score by example id
ConditionScores = Mapping[str, Scores]


def text_scores(
    examples: Sequence[Example], answers: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Token-F1 of every answer, and exact match of answers to questions.

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

    A row is a benchmark or, if it has several, one of its subsets (``metadata["subset"]``). With
    several benchmarks, two more rows hold their average with equal weights ("Average") and the
    average of all their examples ("Pooled"). A row has the keys of :meth:`Comparison.as_json`, the
    controls' means over the same examples, and "equivalent_holm" and "non_inferior_holm": whether
    the mark holds together with those of the metric's other rows (Holm's procedure).

    Args:
        videos: example id -> video.
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
        rows.append(_row_json("Average", None, average(pairs, videos, margin), means))
        everything = {
            n: _mean({k: v for picked in whole for k, v in picked[n].items()}) for n in shared
        }
        rows.append(_row_json("Pooled", None, pooled(pairs, videos, margin), everything))
    intervals = [Interval(row["difference"], row["low"], row["high"]) for row in rows]
    for name, two_sided in (("equivalent", True), ("non_inferior", False)):
        together = holm(intervals, margin, two_sided)
        for row, holds in zip(rows, together, strict=True):
            row[f"{name}_holm"] = row[name] and holds
    return rows


def _pick(examples: Sequence[Example], scores: ConditionScores) -> dict[str, Scores] | None:
    """Scores of the examples that baseline and system share; None if there are none."""
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
    comparison = compare(scores[SYSTEM], scores[BASELINE], videos, margin)
    return _row_json(dataset, subset, comparison, controls)


def _row_json(
    dataset: str, subset: str | None, comparison: Comparison, controls: Mapping[str, float]
) -> dict[str, Any]:
    return {
        "benchmark": dataset,
        "subset": subset,
        **comparison.as_json(controls.get(NONE)),
        "controls": dict(controls),
    }


def _controls(scores: Mapping[str, Scores]) -> list[str]:
    return [name for name in scores if name not in (BASELINE, SYSTEM)]


def _mean(scores: Scores) -> float:
    return sum(scores.values()) / len(scores)


# --- Markdown -------------------------------------------------------------------------------------


def markdown(summary: Mapping[str, Any], note_lines: Sequence[str] = ()) -> str:
    """One table per metric of :func:`summarize`, then the notes as a list."""
    parts = [_table(metric, entry) for metric, entry in summary.items()]
    if note_lines:
        parts.append("\n".join(f"- {note}" for note in note_lines))
    return "\n\n".join(parts) + "\n"


def _table(metric: str, entry: Mapping[str, Any]) -> str:
    controls = list(dict.fromkeys(name for row in entry["rows"] for name in row["controls"]))
    head = ["Benchmark", "n", "Base", "V2L", "Δ", "95% CI", "Eq", "NI"]
    head += ["kept above chance", *controls]
    lines = [
        f"**{TITLES[metric]}** (margin {entry['margin']})",
        "",
        "| " + " | ".join(head) + " |",
        "|---" + "|---:" * (len(head) - 1) + "|",
    ]
    for row in entry["rows"]:
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
    """The paper's mark of a row's criterion: in parentheses if it holds on its own but not together
    with the table's other rows; "few" if there are too few videos for a claim."""
    if not row["enough"]:
        return "few"
    if not row[criterion]:
        return "–"
    return "Y" if row[f"{criterion}_holm"] else "(Y)"


def notes(record: Mapping[str, Any]) -> list[str]:
    """Notes below the tables, from the record of an evaluation."""
    tokens = record["prompt_tokens"]
    counts = sorted({len(metric["rows"]) for metric in record["metrics"].values()})
    lines = [
        f"{record['examples']} examples about {record['videos']} videos. Δ is V2L - Base with its "
        "95% interval: a paired bootstrap over videos, united below 100 videos with an exact "
        "interval at the effective number of videos. Eq: the interval lies inside ± the margin; "
        "NI: it lies above - the margin; few: too few videos for a claim at the margin.",
        f"Each table tests {' or '.join(map(str, counts))} rows, each at 2.5% per side, so some "
        "marks may hold by chance; (Y) holds on its own but not together with the table's other "
        "rows (Holm).",
        "Kept above chance: (V2L - no adapter) / (Base - no adapter), the share of what the video "
        "adds that the adapter keeps; V2L / Base also counts what can be guessed without a video.",
        f"Prompt tokens per question: {tokens[BASELINE]:.0f} with the video in context, "
        f"{tokens[SYSTEM]:.0f} with the adapter.",
    ]
    if any(row["benchmark"] == "Pooled" for m in record["metrics"].values() for row in m["rows"]):
        lines.append(
            "Average: every benchmark has the same weight; Pooled: every example has the same "
            "weight, as in the judge's average of the paper's Table 4. A video in several "
            "benchmarks is resampled in all of them together."
        )
    if unreadable := record["unreadable"]:
        lines.append(f"{len(unreadable)} videos cannot be read and are left out everywhere.")
    if judge := record.get("judge"):
        failed = sorted(judge["failures"].items())
        failures = ", ".join(f"{count} {kind}" for kind, count in failed) or "none"
        lines.append(
            f"Judge {judge['model']}: {judge['requests']} requests, {judge['from_cache']} "
            f"judgments from the cache, {judge['prompt_tokens']} + {judge['completion_tokens']} "
            f"tokens, ${judge['dollars']:.2f}; failed and left out: {failures}. Judgments "
            "do not fail at random (long, empty and unusual answers fail more often), and a pair "
            "with one failure is left out: with many failures the judge's rows describe the easy "
            "pairs."
        )
    return lines


# --- tables of any record -------------------------------------------------------------------------

Rows = Sequence[Mapping[str, Any]]

_INTERVAL = {"estimate", "low", "high"}


def table_columns(rows: Rows) -> dict[str, list[str]]:
    """Column name -> one text per row; nested fields become ``outer.inner``, an interval is one
    text.

    Rows may differ in their fields; a missing field is "-".
    """
    flat = [{name: _cell_text(value) for name, value in _flatten(row, _INTERVAL)} for row in rows]
    names = dict.fromkeys(name for row in flat for name in row)
    return {name: [row.get(name, "-") for row in flat] for name in names}


def markdown_table(rows: Rows) -> str:
    """A Markdown table; every column but the first is aligned right."""
    by_name = table_columns(rows)
    lines = [list(by_name), ["---", *["---:"] * (len(by_name) - 1)]]
    lines += [list(cells) for cells in zip(*by_name.values(), strict=True)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write_csv(path: Path, rows: Rows) -> None:
    """Write the rows with the union of their columns; nested fields become ``outer.inner``.

    Raises:
        WriteError: the file cannot be written.
    """
    flat = [dict(_flatten(row)) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in flat for name in row)))
    writer.writeheader()
    for row in flat:
        writer.writerow(
            {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()}
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())


def interval_text(interval: Mapping[str, float]) -> str:
    """``estimate [low, high]`` with three decimals."""
    return "{estimate:.3f} [{low:.3f}, {high:.3f}]".format(**interval)


def number_text(value: float) -> str:
    """Four significant digits; an integer from 10,000 on."""
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _flatten(
    row: Mapping[str, Any], atom: set[str] | None = None, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """The row's fields with nested mappings unfolded, except those whose keys are ``atom``."""
    for key, value in row.items():
        if isinstance(value, Mapping) and set(value) != atom:
            yield from _flatten(value, atom, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _cell_text(value: Any) -> str:
    match value:
        case Mapping():
            return interval_text(value)
        case list():
            return ", ".join(map(str, value)) or "-"
        case float():
            return number_text(value)
        case None:
            return "-"
    return str(value)
