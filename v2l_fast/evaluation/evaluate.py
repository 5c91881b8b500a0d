"""An evaluation from examples to its record, table and plots.

Responsible for the order of the steps and for the folder that holds them::

    run.json                  what is evaluated; a folder of something else is refused
    adapters/                 one file a video
    answers/<condition>.jsonl appended to as answers come
    judgments.jsonl           the judge's cache
    result.json, table.md, <metric>.png

Everything but the last line survives an interruption and is not made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from v2l_fast.data.manifest import Example, VideoExamples, group_by_video
from v2l_fast.errors import ConfigError
from v2l_fast.evaluation.answers import (
    BASELINE,
    SYSTEM,
    AnswerSettings,
    Loader,
    VideoCache,
    answer_all,
    conditions_for,
)
from v2l_fast.evaluation.journal import Journal
from v2l_fast.evaluation.judge import Judge, Preference
from v2l_fast.evaluation.plots import plot_distributions
from v2l_fast.evaluation.report import markdown, summarize, text_scores
from v2l_fast.evaluation.rubrics import JudgeTask
from v2l_fast.files import write_json, write_text
from v2l_fast.loading import recorded_name
from v2l_fast.model import Video2LoRA
from v2l_fast.outputs import ResumableFolder

# (stage, done, total)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        record: JSON of everything below in short; see `evaluate`.
        table: Markdown.
        answers: condition -> example id -> text.
        scores: metric -> condition -> example id -> score.
        files: written ones, when there is a folder.
    """

    record: dict[str, Any]
    table: str
    answers: dict[str, dict[str, str]]
    scores: dict[str, dict[str, dict[str, float]]]
    files: tuple[Path, ...] = ()


def evaluate(
    model: Video2LoRA,
    examples: Sequence[Example],
    settings: AnswerSettings,
    load: Loader,
    folder: Path | None = None,
    judge: Judge | None = None,
    pairs: bool = False,
    batch: int = 16,
    progress: Progress = lambda stage, done, total: None,
) -> Evaluation:
    """Answer, score and compare; continue where a run into the same folder was interrupted.

    Args:
        load: reads a video.
        folder: holds what outlives the process; None keeps everything in memory.
        judge: scores every condition's answers besides token-F1.
        pairs: let the judge also see baseline and system side by side, as an audit.
        batch: examples answered at a time.

    Returns:
        The record's keys: "examples", "videos", "unreadable" (name -> reason), "conditions",
        "settings", "model", "prompt_tokens" (mean by condition), "metrics"
        (:func:`~v2l_fast.evaluation.report.summarize`) and, with a judge, "judge".

    Raises:
        ConfigError: the folder holds another evaluation, or no example could be answered.
    """
    videos = group_by_video(examples)
    identity = _identity(model, settings, videos)
    if folder is not None:
        ResumableFolder(folder, identity)
    library = VideoCache(model, settings, load, folder and folder / "adapters", clips=batch + 1)
    journals = {
        name: Journal(folder and folder / "answers" / f"{_file_name(name)}.jsonl")
        for name in conditions_for(library, videos)
    }
    unreadable = _answer_all(library, videos, journals, batch, progress)
    answers = {
        name: {e.id: journal[e.id]["text"] for e in examples if e.id in journal}
        for name, journal in journals.items()
    }
    if not any(id_ in answers[BASELINE] for id_ in answers[SYSTEM]):
        reason = next(iter(unreadable.values()), "there is no example")
        raise ConfigError(f"no video of the manifest could be read: {reason}")
    scores = text_scores(examples, answers)
    judged: dict[str, Any] = {}
    if judge is not None:
        scores["judge"] = judge_all(judge, examples, answers, progress)
        if pairs:
            judged["pairs"] = judge_pairs(judge, examples, answers, progress)
        judged = {**judge.report(), **judged}
    names = {e.id: v.path for v in videos for e in v.examples}
    record = {
        "examples": len(examples),
        "videos": len(videos),
        "unreadable": unreadable,
        "conditions": list(journals),
        **identity,
        "prompt_tokens": {
            name: _mean_tokens(journal, examples) for name, journal in journals.items()
        },
        "metrics": summarize(examples, names, scores),
    }
    if judge is not None:
        record["judge"] = judged
    table = markdown(record["metrics"], _notes(record))
    files: tuple[Path, ...] = ()
    if folder is not None:
        write_json(folder / "result.json", record)
        write_text(folder / "table.md", table)
        plots = plot_distributions(examples, scores, folder)
        files = (folder / "table.md", folder / "result.json", *plots)
    return Evaluation(record, table, answers, scores, files)


# --- steps ----------------------------------------------------------------------------------------


def _answer_all(
    library: VideoCache,
    videos: Sequence[VideoExamples],
    journals: Mapping[str, Journal],
    batch: int,
    progress: Progress,
) -> dict[str, str]:
    total = sum(len(video.examples) for video in videos) * len(journals)
    done = 0

    def report(condition: str, count: int) -> None:
        nonlocal done
        done += count
        progress(condition, done, total)

    return answer_all(library, videos, journals, batch, report)


# --- the folder -----------------------------------------------------------------------------------


def _identity(
    model: Video2LoRA, settings: AnswerSettings, videos: Sequence[VideoExamples]
) -> dict[str, Any]:
    """Everything that answers depend on."""
    asked = [(v.name, e.id, e.prompt) for v in videos for e in v.examples]
    return {
        "settings": asdict(settings),
        "model": {
            "hypernetwork": model.hypernet.fingerprint,
            "base": recorded_name(model.backbone.name_or_path),
            "dtype": str(model.backbone.decoder.dtype).removeprefix("torch."),
        },
        "questions": hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16],
    }


def _file_name(condition: str) -> str:
    return condition.replace("'", "").replace(" ", "-")


# --- the record -----------------------------------------------------------------------------------


def _mean_tokens(journal: Journal, examples: Sequence[Example]) -> float | None:
    counts = [journal[e.id]["prompt_tokens"] for e in examples if e.id in journal]
    return sum(counts) / len(counts) if counts else None


def _tests(metrics: Mapping[str, Any]) -> str:
    """Numbers of rows of the tables, in words."""
    counts = sorted({len(metric["rows"]) for metric in metrics.values()})
    return " or ".join(map(str, counts))


def _notes(record: Mapping[str, Any]) -> list[str]:
    """What a reader of the table must know."""
    tokens = record["prompt_tokens"]
    notes = [
        f"{record['examples']} examples about {record['videos']} videos; Δ is V2L - Base with its "
        "95% interval, paired bootstrap over videos (below 100 videos united with an exact one "
        "at the effective number of videos). Eq: inside ± the margin; NI: above - the margin; few: "
        "fewer videos than a claim at the margin needs.",
        f"Each table tests {_tests(record['metrics'])} rows, each at 2.5% a side, so a mark may be "
        "wrong by chance; (Y) holds alone but not together with the table's other rows (Holm).",
        "Kept above chance: (V2L - no adapter) / (Base - no adapter), what the adapter keeps of "
        "what the video adds; V2L / Base also counts what is guessed without a video.",
        f"Prompt tokens a question: {tokens[BASELINE]:.0f} with the video in context, "
        f"{tokens[SYSTEM]:.0f} with the adapter.",
    ]
    if any(row["benchmark"] == "Pooled" for m in record["metrics"].values() for row in m["rows"]):
        notes.append(
            "Average: benchmarks of equal weight; Pooled: examples of equal weight, as the paper's "
            "Table 4 averages the judge. Videos of several benchmarks are resampled together."
        )
    if unreadable := record["unreadable"]:
        notes.append(f"{len(unreadable)} videos could not be read and are left out everywhere.")
    if judged := record.get("judge"):
        failures = judged["failures"]
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(failures.items()))
        notes.append(
            f"Judge {judged['model']}: {judged['requests']} requests, {judged['from_cache']} "
            f"judgments from the cache, {judged['prompt_tokens']} + {judged['completion_tokens']} "
            f"tokens, ${judged['dollars']:.2f}; failed and left out: {listed or 'none'}. Judgments "
            "do not fail at random (long, empty and odd answers fail more often), and a pair with "
            "one failure is left out: with many failures the judge's rows describe the easy pairs."
        )
    return notes


# --- judging --------------------------------------------------------------------------------------


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


def _task(example: Example) -> JudgeTask:
    return JudgeTask(example.prompt, example.target_text, example.is_caption)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
