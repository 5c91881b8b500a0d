"""Cost and answer quality of the methods (paper Section 5.5, Figures 2 and 4), and their timing.

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
    silent,
)
from v2l_fast.evaluation.framefusion import Reduction
from v2l_fast.evaluation.methods import DIRECT, METHODS, Method, MethodSettings
from v2l_fast.work_units import Progress


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
    """Wait for the device's queue; the clock then, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(device: torch.device, work: Callable[[], Result]) -> tuple[Result, float]:
    """The result of ``work`` and its duration in seconds."""
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
