"""What analyses run on: a video, a prompt and what should be answered, scored by any metric.

Responsible for internalizing each video once, for answering many (prompt, adapter) pairs, and for
means with their intervals. Where examples come from is the caller's business.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from v2l_fast.errors import ConfigError, VideoError
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.model import Video, Video2LoRA
from v2l_fast.video import Clip

# Score of an answer against one reference, higher is better.
Metric = Callable[[str, str], float]
# Conditions that stand beside every score.
NONE, ANOTHER = "no adapter", "another video's adapter"
# Called with (what is being done, done, total).
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """A progress report that nobody reads."""


@dataclass(frozen=True)
class EvalExample:
    """One prompt about one video.

    Attributes:
        video: a file or a clip.
        prompt: what is asked.
        references: at least one right answer.
        kind: what scores are grouped by.
    """

    video: Video
    prompt: str
    references: tuple[str, ...]
    kind: str = "all"

    def __post_init__(self) -> None:
        if not self.references:
            raise ConfigError(f"{self.prompt!r} has no reference answer: give at least one")

    @property
    def video_key(self) -> Hashable:
        """Equal for examples about the same video."""
        return self.video.sha256 if isinstance(self.video, Clip) else Path(self.video)

    @property
    def video_name(self) -> str:
        """For messages."""
        source = self.video.path if isinstance(self.video, Clip) else self.video
        return "frames in memory" if source is None else Path(source).name

    def score(self, answer: str, metric: Metric) -> float:
        """Score of the best-matching reference."""
        return max(metric(answer, reference) for reference in self.references)


def by_video(examples: Sequence[EvalExample]) -> list[list[EvalExample]]:
    """Examples of the same video together, in the order in which the videos first appear."""
    groups: dict[Hashable, list[EvalExample]] = {}
    for example in examples:
        groups.setdefault(example.video_key, []).append(example)
    return list(groups.values())


def internalize_each(
    model: Video2LoRA, examples: Sequence[EvalExample], progress: Progress = silent, **options: Any
) -> list[Adapter]:
    """The adapter of each example's video; a video is internalized once.

    Args:
        **options: of ``Video2LoRA.internalize`` (max_frames, longest_edge, chunks, ...).
    """
    first = [group[0] for group in by_video(examples)]
    made: dict[Hashable, Adapter] = {}
    adapters = model.internalize_each((example.video for example in first), **options)
    for example, adapter in zip(first, adapters, strict=True):
        if isinstance(adapter, VideoError):
            raise adapter
        made[example.video_key] = adapter
        progress("internalizing", len(made), len(first))
    return [made[example.video_key] for example in examples]


def answer_scores(
    model: Video2LoRA,
    examples: Sequence[EvalExample],
    adapters: Sequence[Adapter | None],
    metric: Metric,
    max_new_tokens: int = 128,
) -> list[float]:
    """Score of each example's greedy answer through its adapter."""
    said = model.ask(
        [example.prompt for example in examples], list(adapters), max_new_tokens=max_new_tokens
    )
    return [example.score(text, metric) for example, text in zip(examples, said, strict=True)]


def control_scores(
    model: Video2LoRA,
    examples: Sequence[EvalExample],
    adapters: Sequence[Adapter],
    metric: Metric,
    max_new_tokens: int = 128,
) -> dict[str, list[float]]:
    """Scores without an adapter and with another video's, which say what a score owes to the
    video: condition -> one score an example; the second is absent when all are about one video."""
    chosen: dict[str, list[Adapter | None]] = {NONE: [None] * len(examples)}
    if others := other_adapters(examples, adapters):
        chosen[ANOTHER] = list(others)
    return {
        name: answer_scores(model, examples, given, metric, max_new_tokens)
        for name, given in chosen.items()
    }


def other_adapters(examples: Sequence[EvalExample], adapters: Sequence[Adapter]) -> list[Adapter]:
    """For each example the adapter of the next one about another video, from the first on behind
    the last; empty when all are about one video."""
    keys = [example.video_key for example in examples]
    if len(set(keys)) < 2:
        return []

    def following(index: int) -> Adapter:
        order = (*range(index + 1, len(keys)), *range(index))
        return next(adapters[i] for i in order if keys[i] != keys[index])

    return [following(index) for index in range(len(keys))]


def interval(
    values: Sequence[float],
    examples: Sequence[EvalExample],
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> dict[str, float]:
    """Mean of one value an example and its 95% bootstrap interval: {"estimate", "low", "high"}.

    Examples of one video are resampled together, since their values are not independent.

    Args:
        bounds: the values' scale, None where it has no ends.
    """
    from v2l_fast.evaluation.statistics import ratio_interval

    sums: dict[Hashable, float] = defaultdict(float)
    counts: dict[Hashable, int] = defaultdict(int)
    for value, example in zip(values, examples, strict=True):
        sums[example.video_key] += value
        counts[example.video_key] += 1
    return asdict(ratio_interval(list(sums.values()), list(counts.values()), bounds=bounds))


# --- inputs ---------------------------------------------------------------------------------------


# Decodes the part of a file between two times in seconds.
SpanReader = Callable[[str, tuple[float, float]], Clip]


def manifest_examples(
    path: str | os.PathLike,
    read_span: SpanReader | None = None,
    root: str | os.PathLike | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> list[EvalExample]:
    """Examples of a JSONL manifest, video by video; their kind is the subset, or the task type.

    Args:
        read_span: reads the part of a file that an example is about; whole files are only named.
        root, split: see :func:`v2l_fast.data.manifest.load_manifest`.
        limit: number of videos, from the first on.

    Raises:
        ManifestError: the manifest cannot be used.
        ConfigError: no example is left, or one is about a part of a file and ``read_span`` is None.
        VideoError: a part of a file cannot be read.
    """
    from v2l_fast.data.manifest import group_by_video, load_manifest

    found = []
    for video in group_by_video(load_manifest(path, root, split))[:limit]:
        source: Video = video.path
        if video.span is not None:
            if read_span is None:
                raise ConfigError(
                    f"{path}: {video.name} is a part of a file; name whole files here"
                )
            source = read_span(video.path, video.span)
        asked: dict[tuple[str, str], list[str]] = {}
        for line in video.examples:
            kind = str(line.metadata.get("subset", line.task_type))
            asked.setdefault((line.prompt, kind), []).append(line.target_text)
        found += [
            EvalExample(source, prompt, tuple(dict.fromkeys(references)), kind)
            for (prompt, kind), references in asked.items()
        ]
    if not found:
        raise ConfigError(f"{path}: no example to analyze; check --split and --limit")
    return found
