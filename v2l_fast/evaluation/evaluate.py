"""One evaluation, from examples to its record, table and plots.

Responsible for the order of the steps and for the folder that holds their results::

    run.json                  what is evaluated; a folder with another evaluation is refused
    adapters/                 one file per video
    answers/<condition>.jsonl one line per answer
    judgments.jsonl           the judge's cache
    result.json, table.md, <metric>.png

A resumed evaluation reuses everything but the last line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from v2l_fast.evaluation.judge import Judge, JudgeTask, Preference
from v2l_fast.evaluation.plots import plot_distributions
from v2l_fast.evaluation.report import markdown, notes, summarize, text_scores
from v2l_fast.files import json_sha256, write_json, write_text
from v2l_fast.loading import recorded_name
from v2l_fast.model import Video2LoRA
from v2l_fast.outputs import Journal, ResumableFolder
from v2l_fast.work_units import Progress, silent


@dataclass(frozen=True)
class Evaluation:
    """Result of :func:`evaluate`.

    Attributes:
        record: JSON-ready summary; its keys are listed at :func:`evaluate`.
        table: Markdown.
        answers: condition -> example id -> text.
        scores: metric -> condition -> example id -> score.
        files: paths of the table, the record and the plots, if there is a folder.
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
    progress: Progress = silent,
) -> Evaluation:
    """Answer, score and compare; resume if the folder contains part of the same evaluation.

    Args:
        load: reads a video.
        folder: where results are written; None keeps everything in memory.
        judge: also scores every condition's answers.
        pairs: as an audit, let the judge also compare baseline and system side by side.
        batch: number of examples answered together.

    Returns:
        The record's keys: "examples", "videos", "unreadable" (name -> reason), "conditions",
        "settings", "model", "prompt_tokens" (mean by condition), "metrics"
        (:func:`~v2l_fast.evaluation.report.summarize`) and, with a judge, "judge".

    Raises:
        ConfigError: the folder contains another evaluation, or no video can be read.
        JudgeError: the judge cannot be used.
    """
    videos = group_by_video(examples)
    fingerprint = _fingerprint(model, settings, videos)
    if folder is not None:
        ResumableFolder(folder, fingerprint)
    cache = VideoCache(model, settings, load, folder and folder / "adapters", clips=batch + 1)
    journals = {
        name: Journal(folder and folder / "answers" / f"{_file_name(name)}.jsonl")
        for name in conditions_for(cache, videos)
    }
    unreadable = answer_all(cache, videos, journals, batch, progress)
    answers = {
        name: {e.id: journal[e.id]["text"] for e in examples if e.id in journal}
        for name, journal in journals.items()
    }
    if not any(id_ in answers[BASELINE] for id_ in answers[SYSTEM]):
        reason = next(iter(unreadable.values()), "it has no examples")
        raise ConfigError(f"no video of the manifest can be read: {reason}")
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
        **fingerprint,
        "prompt_tokens": {
            name: _mean_tokens(journal, examples) for name, journal in journals.items()
        },
        "metrics": summarize(examples, names, scores),
    }
    if judge is not None:
        record["judge"] = judged
    table = markdown(record["metrics"], notes(record))
    files: tuple[Path, ...] = ()
    if folder is not None:
        write_json(folder / "result.json", record)
        write_text(folder / "table.md", table)
        plots = plot_distributions(examples, scores, folder)
        files = (folder / "table.md", folder / "result.json", *plots)
    return Evaluation(record, table, answers, scores, files)


# --- the folder -----------------------------------------------------------------------------------


def _fingerprint(
    model: Video2LoRA, settings: AnswerSettings, videos: Sequence[VideoExamples]
) -> dict[str, Any]:
    """Everything that the answers depend on."""
    questions = [(v.name, e.id, e.prompt) for v in videos for e in v.examples]
    return {
        "settings": settings.to_dict(),
        "model": {
            "hypernetwork": model.hypernet.fingerprint,
            "base": recorded_name(model.backbone.name_or_path),
            "dtype": str(model.backbone.decoder.dtype).removeprefix("torch."),
        },
        "questions": json_sha256(*questions)[:16],
    }


def _file_name(condition: str) -> str:
    return condition.replace("'", "").replace(" ", "-")


# --- the record -----------------------------------------------------------------------------------


def _mean_tokens(journal: Journal, examples: Sequence[Example]) -> float | None:
    counts = [journal[e.id]["prompt_tokens"] for e in examples if e.id in journal]
    return sum(counts) / len(counts) if counts else None


# --- judging --------------------------------------------------------------------------------------


def judge_all(
    judge: Judge,
    examples: Sequence[Example],
    answers: Mapping[str, Mapping[str, str]],
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """The judge's scores: condition -> example id -> score; failed judgments are left out."""
    pairs = [(name, e) for name, texts in answers.items() for e in examples if e.id in texts]
    verdicts = judge.score(
        [_task(e) for _, e in pairs],
        [answers[name][e.id] for name, e in pairs],
        lambda done, total: progress("judging", done, total),
    )
    scores: dict[str, dict[str, float]] = {name: {} for name in answers}
    for (name, example), verdict in zip(pairs, verdicts, strict=True):
        if verdict.score is not None:
            scores[name][example.id] = verdict.score
    return scores


def judge_pairs(
    judge: Judge,
    examples: Sequence[Example],
    answers: Mapping[str, Mapping[str, str]],
    progress: Progress,
) -> dict[str, Any]:
    """Counts of pairs in which the judge prefers the system, the baseline or neither, and both mean
    scores."""
    system, baseline = answers[SYSTEM], answers[BASELINE]
    shared = [e for e in examples if e.id in system and e.id in baseline]
    preferences = judge.compare(
        [_task(e) for e in shared],
        [system[e.id] for e in shared],
        [baseline[e.id] for e in shared],
        progress=lambda done, total: progress("judging pairs", done, total),
    )
    compared = [p for p in preferences if isinstance(p, Preference)]
    return {
        "pairs": len(compared),
        "failed": len(preferences) - len(compared),
        "system_preferred": sum(p.preferred == 1 for p in compared),
        "ties": sum(p.preferred == 0 for p in compared),
        "baseline_preferred": sum(p.preferred == -1 for p in compared),
        "system": _mean([p.first for p in compared]),
        "baseline": _mean([p.second for p in compared]),
    }


def _task(example: Example) -> JudgeTask:
    return JudgeTask(example.prompt, example.target_text, example.is_caption)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
