"""Cost and answer quality of the methods (paper Section 5.5, Figures 2 and 4), and the sweep over
frames and resolution (Section 5.4, Figure 3).

A method prepares a video in P seconds and gives a question's first token after q seconds, so n
questions cost (P + n·q) / n each. Against direct inference with d seconds per question it breaks
even at the first n with P + n·q < n·d.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any, TypeVar

import torch

from v2l_fast.evaluation.examples import (
    EvalExample,
    Metric,
    by_video,
    control_scores,
    internalize_each,
    interval,
)
from v2l_fast.evaluation.methods import DIRECT, METHODS, Method, MethodSettings, Reduction
from v2l_fast.files import json_sha256
from v2l_fast.generation import Answer
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.model import Video2LoRA
from v2l_fast.outputs import ResumableFolder
from v2l_fast.work_units import Progress, silent


def amortized(preparation: float, query: float, questions: int) -> float:
    """Seconds per question if ``questions`` (at least 1) are asked about a video."""
    return preparation / questions + query


def break_even(preparation: float, query: float, direct: float) -> int | None:
    """The smallest number of questions at which a method costs less than direct inference; None if
    it never does."""
    if query >= direct:
        return None
    return math.floor(preparation / (direct - query)) + 1


def compare_methods(
    setting: MethodSettings,
    examples: Sequence[EvalExample],
    metric: Metric,
    methods: Sequence[Method] = METHODS,
    repeats: int = 3,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure every method on the same videos and questions.

    Times are medians: preparation over videos, time to first token over questions and ``repeats``.
    A warm-up on the first question is not counted. Direct inference is always included.

    Returns:
        "videos", "keep" (of FrameFusion), "questions", "questions_per_video", "visual_tokens"
        (mean of the direct prompts), "controls" (condition -> interval of the score, see
        :func:`~v2l_fast.evaluation.examples.control_scores`) and "rows": for each method "method",
        "preparation" and "first_token" (s), "bytes" (mean per video), "score" (interval over
        videos), "amortized" (s per question at the mean number of questions), "break_even"
        (questions; null: never), "same_as_direct" (share of answers with exactly the tokens of
        direct inference), and "merged" and "pruned", removed visual tokens (mean over videos, or
        over questions if every question reduces again; null without token reduction).
    """
    methods = (DIRECT, *(m for m in methods if m is not DIRECT))
    groups = by_video(examples)
    first = groups[0][0]
    for method in methods:
        method.ask(setting, method.prepare(setting, first.video), first.prompt)
    tallies = {method.name: _Tally() for method in methods}
    # Methods alternate video by video, so a drift of the machine's speed affects all equally.
    for done, group in enumerate(groups):
        progress("comparing methods", done, len(groups))
        for method in methods:
            _measure(tallies[method.name], setting, method, group, repeats)
    progress("comparing methods", len(groups), len(groups))
    per_video = len(examples) / len(groups)
    ordered = [example for group in groups for example in group]
    direct = tallies[DIRECT.name]
    rows = []
    for name, tally in tallies.items():
        prepares = tally is not direct
        preparation = median(tally.preparation) if prepares else 0.0
        wait = median(tally.waits)
        texts = [setting.model.backbone.decode(tokens) for tokens in tally.tokens]
        scores = [e.score(text, metric) for e, text in zip(ordered, texts, strict=True)]
        same = [a == b for a, b in zip(tally.tokens, direct.tokens, strict=True)]
        rows.append(
            {
                "method": name,
                "preparation": preparation,
                "first_token": wait,
                "bytes": sum(tally.bytes) / len(tally.bytes),
                "score": interval(scores, ordered),
                "amortized": amortized(preparation, wait, max(1, round(per_video))),
                "break_even": break_even(preparation, wait, median(direct.waits))
                if prepares
                else None,
                "same_as_direct": sum(same) / len(same),
                "merged": fmean(r.merged for r in tally.reductions) if tally.reductions else None,
                "pruned": fmean(r.pruned for r in tally.reductions) if tally.reductions else None,
            }
        )
    adapters = internalize_each(setting.model, ordered, sampling=setting.sampling)
    controls = control_scores(setting.model, ordered, adapters, metric, setting.max_new_tokens)
    return {
        "videos": len(groups),
        "keep": setting.fusion.keep,
        "questions": len(examples),
        "questions_per_video": per_video,
        "visual_tokens": _visual_tokens(setting, groups),
        "controls": {name: interval(scores, ordered) for name, scores in controls.items()},
        "rows": rows,
    }


def compare_budgets(
    setting: MethodSettings,
    examples: Sequence[EvalExample],
    metric: Metric,
    budgets: Iterable[tuple[int | None, int | None]],
    repeats: int = 3,
    progress: Progress = silent,
) -> dict[str, Any]:
    """All methods at several numbers of visual tokens (Figure 4).

    Args:
        budgets: pairs of frames and longest edge, which replace the setting's.

    Returns:
        "budgets": for each "frames", "longest_edge" (null: as in training) and what
        :func:`compare_methods` returns.
    """
    records = []
    for frames, edge in budgets:
        exact = setting.sampling.exact_frames
        sampling = setting.model.config.sampling.override(frames, edge, exact_frames=exact)
        sized = replace(setting, sampling=sampling)
        record = compare_methods(sized, examples, metric, repeats=repeats, progress=progress)
        records.append({"frames": frames, "longest_edge": edge, **record})
    return {"budgets": records}


@dataclass
class _Tally:
    """Measurements of a method: seconds and bytes per video, seconds and token ids per question."""

    preparation: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    reductions: list[Reduction] = field(default_factory=list)


def _measure(
    tally: _Tally,
    setting: MethodSettings,
    method: Method,
    group: Sequence[EvalExample],
    repeats: int,
) -> None:
    """Prepare one video and ask all its questions."""
    device = setting.model.backbone.decoder.device
    prepared, seconds = timed(device, lambda: method.prepare(setting, group[0].video))
    tally.preparation.append(seconds)
    tally.bytes.append(prepared.bytes)
    tally.reductions += [prepared.reduction] if prepared.reduction else []
    brief = replace(setting, max_new_tokens=1)
    for example in group:
        answer = method.ask(setting, prepared, example.prompt)
        repeated = [method.ask(brief, prepared, example.prompt) for _ in range(repeats - 1)]
        tally.tokens.append(answer.tokens)
        tally.reductions += [answer.reduction] if answer.reduction else []
        tally.waits += [a.time_to_first_token for a in (answer, *repeated)]


def _visual_tokens(setting: MethodSettings, groups: Sequence[Sequence[EvalExample]]) -> float:
    backbone = setting.model.backbone
    counts = [backbone.video_prefix(setting.encode(g[0].video)).visual_tokens for g in groups]
    return sum(counts) / len(counts)


# --- timing ---------------------------------------------------------------------------------------


Result = TypeVar("Result")

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def synchronized_time(device: torch.device) -> float:
    """Seconds of the clock when the device has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(device: torch.device, work: Callable[[], Result]) -> tuple[Result, float]:
    """Run ``work``; return its result and its duration in seconds."""
    start = synchronized_time(device)
    result = work()
    return result, synchronized_time(device) - start


class Stopwatch:
    """A progress callback that times stages: each report ends the previous stage.

    Attributes:
        seconds: stage -> seconds so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._stage: str | None = None
        self._since = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.stop()
        self._stage = stage

    def stop(self) -> None:
        """End the current stage."""
        now = synchronized_time(self._device)
        if self._stage is not None:
            self.seconds[self._stage] += now - self._since
        self._stage, self._since = None, now


class PeakMemory:
    """Peak memory within a ``with`` block.

    On a GPU the maximum that the allocator held; on a CPU the process's largest resident set, if
    the system lets a process reset it (Linux).

    Attributes:
        bytes: set at the end of the block; None if it cannot be measured.
    """

    bytes: int | None = None

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._can_reset = True

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return self
        try:
            _RESET.write_text("5")
        except OSError:
            self._can_reset = False
        return self

    def __exit__(self, *failure: object) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device)
        elif self._can_reset:
            (line,) = (x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM:"))
            self.bytes = int(line.split()[1]) * 1024


# --- sweep over frames and resolution -------------------------------------------------------------

# Every cell samples exactly its number of frames from every video; a video with fewer frames is
# left out of the cell and named. Each cell is one file, so an interrupted sweep resumes.

FRAMES = (8, 12, 24, 48, 128, 256, 512, 1024)
RESOLUTIONS = (224, 336, 512, 1024)
# Columns of the printed table, field -> heading: 80 characters wide. Failed cells are named below
# the table.
COLUMNS = {
    "frames": "frames",
    "longest_edge": "edge",
    "videos": "videos",
    "score_direct": "direct",
    "score_adapter": "adapter",
    "speedup": "speedup",
    "token_reduction": "tokens",
}


def sweep(
    model: Video2LoRA,
    examples: Sequence[EvalExample],
    metric: Metric,
    folder: Path,
    frames: Sequence[int] = FRAMES,
    resolutions: Sequence[int] = RESOLUTIONS,
    max_new_tokens: int = 128,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure every cell that ``folder`` does not hold yet.

    Args:
        frames: exact numbers of frames.
        resolutions: longest edges, pixels.

    Returns:
        "rows": one dict per cell, see :func:`measure_cell`.

    Raises:
        ConfigError: the folder contains a sweep of other examples, another model or other settings.
    """
    results = ResumableFolder(folder, _fingerprint(model, examples, max_new_tokens))
    cells = [(count, edge) for count in frames for edge in resolutions]
    rows = []
    for done, (count, edge) in enumerate(cells):
        progress(f"{count} frames, {edge} px", done, len(cells))
        measure = partial(measure_cell, model, examples, metric, count, edge, max_new_tokens)
        rows.append(results.record(f"{count}x{edge}", measure))
    progress("swept", len(cells), len(cells))
    return {"rows": rows}


def measure_cell(
    model: Video2LoRA,
    examples: Sequence[EvalExample],
    metric: Metric,
    frames: int,
    longest_edge: int,
    max_new_tokens: int = 128,
) -> dict[str, Any]:
    """Measure one cell, one question at a time.

    Returns:
        "frames", "longest_edge", "videos", "questions", "left_out" (videos of fewer frames) and,
        unless no video is left or memory runs out (then "failed" is the reason):
        "score_direct", "score_adapter", "score_change" (interval of adapter - direct, paired);
        "controls" (condition -> score, see
        :func:`~v2l_fast.evaluation.examples.control_scores`);
        "first_token_direct", "first_token_adapter" (s, medians, from decoded frames) and their
        ratio "speedup"; "tokens_direct", "tokens_adapter" (prompt tokens, means) and their ratio
        "token_reduction"; "internalization", stage -> s (medians over videos); "peak_direct",
        "peak_internalization" (bytes, see :class:`PeakMemory`).
    """
    cell = _Cell(model, frames, longest_edge, max_new_tokens)
    shape: dict[str, Any] = {"frames": frames, "longest_edge": longest_edge}
    try:
        for group in by_video(examples):
            cell.add(group)
    except torch.OutOfMemoryError:
        return shape | {"failed": "out of memory"}
    shape |= {"videos": cell.videos, "questions": len(cell.examples), "left_out": cell.left_out}
    if not cell.videos:
        return shape | {"failed": f"no video has {frames} frames"}
    return shape | cell.summary(metric)


class _Cell:
    """The measurements of one cell, accumulated video by video."""

    def __init__(self, model: Video2LoRA, frames: int, edge: int, max_new_tokens: int) -> None:
        self.videos = 0
        self.left_out: list[str] = []
        self.examples: list[EvalExample] = []
        self._model, self._frames, self._edge = model, frames, edge
        self._limit = max_new_tokens
        self._direct: list[Answer] = []
        self._adapter: list[Answer] = []
        self._adapters: list[Adapter] = []
        self._stages: dict[str, list[float]] = defaultdict(list)
        self._peaks: dict[str, list[int]] = defaultdict(list)

    def add(self, group: Sequence[EvalExample]) -> None:
        """Measure the examples of one video, unless it has too few frames."""
        model, edge, limit = self._model, self._edge, self._limit
        device, video = model.backbone.decoder.device, group[0].video
        sampling = model.config.sampling.override(self._frames, edge, exact_frames=True)
        clip, decoding = timed(device, lambda: model.load_clip(video, sampling))
        if len(clip.frames) != self._frames:
            self.left_out.append(f"{group[0].video_name} ({len(clip.frames)} frames)")
            return
        if not self.videos:
            # Warm-up, not counted.
            model.answer_direct(group[0].prompt, clip, edge, max_new_tokens=1)
            model.answer(group[0].prompt, model.internalize(clip, longest_edge=edge))
        self.videos += 1
        self.examples += group
        watch = Stopwatch(device)
        with PeakMemory(device) as memory:
            adapter = model.internalize(clip, longest_edge=edge, progress=watch)
        watch.stop()
        self._peaks["internalization"].append(memory.bytes or 0)
        watch.seconds["decode"] += decoding
        for stage, seconds in watch.seconds.items():
            self._stages[stage].append(seconds)
        self._adapters += [adapter] * len(group)
        for example in group:
            with PeakMemory(device) as memory:
                self._direct += model.answer_direct(
                    example.prompt, clip, edge, max_new_tokens=limit
                )
            self._peaks["direct"].append(memory.bytes or 0)
            self._adapter += model.answer(example.prompt, adapter, max_new_tokens=limit)

    def summary(self, metric: Metric) -> dict[str, Any]:
        """The results, see :func:`measure_cell`."""
        direct, adapter = (
            [e.score(a.text, metric) for e, a in zip(self.examples, answers, strict=True)]
            for answers in (self._direct, self._adapter)
        )
        waits, tokens = (
            [
                summarize(getattr(a, name) for a in answers)
                for answers in (self._direct, self._adapter)
            ]
            for name, summarize in (("time_to_first_token", median), ("prompt_tokens", fmean))
        )
        changes = [a - d for a, d in zip(adapter, direct, strict=True)]
        controls = control_scores(self._model, self.examples, self._adapters, metric, self._limit)
        return {
            "score_direct": fmean(direct),
            "score_adapter": fmean(adapter),
            "score_change": interval(changes, self.examples, (-1.0, 1.0)),
            "controls": {name: fmean(scores) for name, scores in controls.items()},
            "first_token_direct": waits[0],
            "first_token_adapter": waits[1],
            "speedup": waits[0] / waits[1],
            "tokens_direct": tokens[0],
            "tokens_adapter": tokens[1],
            "token_reduction": tokens[0] / tokens[1],
            "internalization": {s: median(seconds) for s, seconds in self._stages.items()},
            "peak_direct": max(self._peaks["direct"]) or None,
            "peak_internalization": max(self._peaks["internalization"]) or None,
        }


def _fingerprint(
    model: Video2LoRA, examples: Sequence[EvalExample], max_new_tokens: int
) -> dict[str, Any]:
    decoder = model.backbone.decoder
    questions = [(str(e.video_key), e.prompt, e.references) for e in examples]
    return {
        "hypernetwork": model.hypernet.fingerprint,
        "base": model.backbone.name_or_path,
        "device": str(decoder.device),
        "dtype": str(decoder.dtype),
        "max_new_tokens": max_new_tokens,
        "questions": json_sha256(*questions)[:16],
    }
