"""Sweep over frames x resolution: adapter against direct inference (paper Section 5.4, Figure 3).

Every cell samples exactly its number of frames from every video; a video with fewer frames is left
out of the cell and named. Each cell is one file, so an interrupted sweep resumes.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from v2l_fast.evaluation.efficiency import PeakMemory, Stopwatch, timed
from v2l_fast.evaluation.examples import (
    EvalExample,
    Metric,
    by_video,
    control_scores,
    interval,
    silent,
)
from v2l_fast.generation import Answer
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.model import Video2LoRA
from v2l_fast.outputs import ResumableFolder
from v2l_fast.work_units import Progress

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
        ConfigError: the folder holds a sweep of other examples, another model or other settings.
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
        "peak_internalization" (bytes, see :class:`~v2l_fast.evaluation.efficiency.PeakMemory`).
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
        "questions": hashlib.sha256(json.dumps(questions).encode()).hexdigest()[:16],
    }
