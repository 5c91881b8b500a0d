"""Examples of the ablations and efficiency comparisons: a video, a prompt and its references; and
the scores of one answer.

Responsible for internalizing each video once, for scoring many (prompt, adapter) pairs with any
metric, and for means with intervals over videos.
"""

from __future__ import annotations

import os
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from v2l_fast.errors import ConfigError, VideoError
from v2l_fast.evaluation.answers import NONE, OTHER
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.model import Video, Video2LoRA
from v2l_fast.video import Clip, FrameSampling
from v2l_fast.work_units import Progress, silent

# Score of an answer against one reference, higher is better.
Metric = Callable[[str, str], float]
# Decodes the span of a file between two times in seconds.
SpanReader = Callable[[str, tuple[float, float]], Clip]


@dataclass(frozen=True)
class EvalExample:
    """One prompt about one video.

    Attributes:
        video: a file or a clip.
        prompt: the instruction or question.
        references: one or more correct answers.
        kind: scores are grouped by it.
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
        """Name for messages."""
        source = self.video.path if isinstance(self.video, Clip) else self.video
        return "frames in memory" if source is None else Path(source).name

    def score(self, answer: str, metric: Metric) -> float:
        """Score against the best-matching reference."""
        return max(metric(answer, reference) for reference in self.references)


def manifest_examples(
    path: str | os.PathLike,
    read_span: SpanReader | None = None,
    root: str | os.PathLike | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> list[EvalExample]:
    """Examples of a JSONL manifest, video by video.

    Lines with the same video, prompt and kind (the subset, or else the task type) become one
    example with several references.

    Args:
        read_span: reads a span of a file; whole files are read later.
        root, split: see :func:`v2l_fast.data.manifest.load_manifest`.
        limit: use only the first ``limit`` videos.

    Raises:
        ManifestError: the manifest is invalid.
        ConfigError: no example is left, or an example is about a span and ``read_span`` is None.
        VideoError: a span cannot be read.
    """
    from v2l_fast.data.manifest import group_by_video, load_manifest

    examples = []
    for video in group_by_video(load_manifest(path, root, split))[:limit]:
        source: Video = video.path
        if video.span is not None:
            if read_span is None:
                raise ConfigError(
                    f"{path}: {video.name} is a span of a file; this command needs whole files"
                )
            source = read_span(video.path, video.span)
        references: dict[tuple[str, str], list[str]] = {}
        for line in video.examples:
            kind = str(line.metadata.get("subset", line.task_type))
            references.setdefault((line.prompt, kind), []).append(line.target_text)
        examples += [
            EvalExample(source, prompt, tuple(dict.fromkeys(texts)), kind)
            for (prompt, kind), texts in references.items()
        ]
    if not examples:
        raise ConfigError(f"{path}: no example to analyze; check --split and --limit")
    return examples


def by_video(examples: Sequence[EvalExample]) -> list[list[EvalExample]]:
    """Group examples by video, in the order in which the videos first appear."""
    groups: dict[Hashable, list[EvalExample]] = {}
    for example in examples:
        groups.setdefault(example.video_key, []).append(example)
    return list(groups.values())


def internalize_each(
    model: Video2LoRA,
    examples: Sequence[EvalExample],
    progress: Progress = silent,
    *,
    sampling: FrameSampling | None = None,
    chunks: int = 1,
) -> list[Adapter]:
    """The adapter of each example's video; each video is internalized once.

    The keyword arguments are those of ``Video2LoRA.internalize_each``.

    Raises:
        VideoError: a video cannot be read.
    """
    first = [group[0] for group in by_video(examples)]
    by_key: dict[Hashable, Adapter] = {}
    adapters = model.internalize_each(
        (example.video for example in first), sampling=sampling, chunks=chunks
    )
    for example, adapter in zip(first, adapters, strict=True):
        if isinstance(adapter, VideoError):
            raise adapter
        by_key[example.video_key] = adapter
        progress("internalizing", len(by_key), len(first))
    return [by_key[example.video_key] for example in examples]


def answer_scores(
    model: Video2LoRA,
    examples: Sequence[EvalExample],
    adapters: Sequence[Adapter | None],
    metric: Metric,
    max_new_tokens: int = 128,
) -> list[float]:
    """Score of each example's greedy answer through its adapter."""
    prompts = [example.prompt for example in examples]
    answers = model.ask(prompts, list(adapters), max_new_tokens=max_new_tokens)
    return [example.score(text, metric) for example, text in zip(examples, answers, strict=True)]


def control_scores(
    model: Video2LoRA,
    examples: Sequence[EvalExample],
    adapters: Sequence[Adapter],
    metric: Metric,
    max_new_tokens: int = 128,
) -> dict[str, list[float]]:
    """Scores without an adapter and with another video's adapter: the part of a score that does
    not depend on the video.

    Returns:
        Condition -> one score per example. Another video's adapter is left out if all examples are
        about one video.
    """
    controls: dict[str, list[Adapter | None]] = {NONE: [None] * len(examples)}
    if others := other_adapters(examples, adapters):
        controls[OTHER] = list(others)
    return {
        name: answer_scores(model, examples, control, metric, max_new_tokens)
        for name, control in controls.items()
    }


def other_adapters(examples: Sequence[EvalExample], adapters: Sequence[Adapter]) -> list[Adapter]:
    """For each example, the adapter of the next example about a different video (wrapping around);
    empty if all examples are about one video."""
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
    """Mean of one value per example and its 95% bootstrap interval: {"estimate", "low", "high"}.

    Examples about one video are resampled together because their values are not independent.

    Args:
        bounds: range of the values; None if they are unbounded.
    """
    # scipy is slow to import and not needed for help.
    from v2l_fast.evaluation.statistics import ratio_interval

    sums: dict[Hashable, float] = defaultdict(float)
    counts: dict[Hashable, int] = defaultdict(int)
    for value, example in zip(values, examples, strict=True):
        sums[example.video_key] += value
        counts[example.video_key] += 1
    return asdict(ratio_interval(list(sums.values()), list(counts.values()), bounds=bounds))


# --- scores of one answer -------------------------------------------------------------------------

_ARTICLES = frozenset({"a", "an", "the"})
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_tokens(text: str) -> list[str]:
    """The normalized tokens of a text."""
    words = text.lower().translate(_NO_PUNCTUATION).split()
    return [word for word in words if word not in _ARTICLES]


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of token precision and recall, 0 to 1; 1 for two empty texts."""
    tokens, expected = normalize_tokens(answer), normalize_tokens(reference)
    if not tokens or not expected:
        return float(tokens == expected)
    shared = sum((Counter(tokens) & Counter(expected)).values())
    return 2 * shared / (len(tokens) + len(expected))


def exact_match(answer: str, reference: str) -> float:
    """1.0 if the normalized tokens are equal, else 0.0."""
    return float(normalize_tokens(answer) == normalize_tokens(reference))
