"""Answers of every condition to every example: same videos, prompts, frames and greedy decoding.

Responsible for the conditions, for decoding and internalizing each video once, and for resuming an
interrupted run. Scores are `report`'s and `judge`'s.

Conditions: the video in context (the baseline), its adapter (the system), and controls that show
how much of an answer is due to the video: another video's adapter, the adapter of a black video,
the bias adapter that all videos share, and no adapter at all.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from v2l_fast.data.manifest import Example, VideoExamples
from v2l_fast.errors import VideoError
from v2l_fast.generation import Answer
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.model import Video2LoRA
from v2l_fast.outputs import Journal
from v2l_fast.video import Clip, FrameSampling
from v2l_fast.work_units import Progress, silent

BASELINE = "direct"
SYSTEM = "adapter"
OTHER = "another video's adapter"
BLANK = "black video's adapter"
BIAS = "bias adapter only"
NONE = "no adapter"
CONDITIONS = (BASELINE, SYSTEM, OTHER, BLANK, BIAS, NONE)

Loader = Callable[[VideoExamples], Clip]
Question = tuple[VideoExamples, Example]


@dataclass(frozen=True)
class AnswerSettings:
    """Frames and answer length, the same for every condition.

    Attributes:
        sampling: None takes that of the hypernetwork's training.
        max_new_tokens: maximum length of an answer.
    """

    sampling: FrameSampling | None = None
    max_new_tokens: int = 128

    def to_dict(self) -> dict[str, int | bool | None]:
        """JSON-ready, for records."""
        sampling = self.sampling
        return {
            "max_frames": None if sampling is None else sampling.max_frames,
            "longest_edge": None if sampling is None else sampling.longest_edge,
            "exact_frames": sampling is not None and sampling.exact_frames,
            "max_new_tokens": self.max_new_tokens,
        }


# --- clips and adapters ---------------------------------------------------------------------------


def blank(clip: Clip) -> Clip:
    """The same number, size and times of frames, all black."""
    sha256 = hashlib.sha256(b"blank").hexdigest()
    return replace(clip, frames=torch.zeros_like(clip.frames), sha256=sha256, path=None)


class VideoCache:
    """Clips and adapters of the evaluated videos, each computed once.

    Args:
        load: reads a video; its VideoError reaches the caller of ``clip`` and ``adapter``.
        folder: keeps adapters on disk, one file each, so that a resumed evaluation internalizes no
            video again; None keeps them in memory.
        clips: maximum number of decoded clips in memory; at least the number of videos in one
            batch.
    """

    def __init__(
        self,
        model: Video2LoRA,
        settings: AnswerSettings,
        load: Loader,
        folder: Path | None = None,
        clips: int = 17,
    ) -> None:
        self.model = model
        self.settings = settings
        self._load = load
        self._folder = folder
        self._capacity = clips
        self._clips: OrderedDict[str, Clip] = OrderedDict()
        self._adapters: dict[str, Adapter] = {}

    def clip(self, video: VideoExamples) -> Clip:
        """The video's sampled frames. Raises VideoError if it cannot be read."""
        name = video.name
        if name not in self._clips:
            self._clips[name] = self._load(video)
        self._clips.move_to_end(name)
        if len(self._clips) > self._capacity:
            self._clips.popitem(last=False)
        return self._clips[name]

    def adapter(self, video: VideoExamples) -> Adapter:
        """The video's adapter. Raises VideoError if it cannot be read."""
        return self._cached(video.name, lambda: self.clip(video))

    def blank_adapter(self, video: VideoExamples) -> Adapter:
        """The adapter of :func:`blank` frames; videos with the same frame size and times share
        it."""
        clip = self.clip(video)
        key = f"blank {tuple(clip.frames.shape)} {clip.timestamps} {clip.duration}"
        return self._cached(key, lambda: blank(clip))

    def _cached(self, key: str, make_clip: Callable[[], Clip]) -> Adapter:
        if self._folder is None:
            if key not in self._adapters:
                self._adapters[key] = self._internalize(make_clip())
            return self._adapters[key]
        path = self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        if path.exists():
            return self.model.load_adapter(path)
        adapter = self._internalize(make_clip())
        self._folder.mkdir(parents=True, exist_ok=True)
        adapter.save(path)
        return adapter

    def _internalize(self, clip: Clip) -> Adapter:
        return self.model.internalize(clip, sampling=self.settings.sampling)


# --- answers --------------------------------------------------------------------------------------


def conditions_for(cache: VideoCache, videos: Sequence[VideoExamples]) -> tuple[str, ...]:
    """The conditions that apply: another video's adapter needs two videos, the bias adapter a
    network that has one."""
    left_out = set()
    if len({video.path for video in videos}) < 2:
        left_out.add(OTHER)
    if not cache.model.config.bias_adapter:
        left_out.add(BIAS)
    return tuple(name for name in CONDITIONS if name not in left_out)


def answer_all(
    cache: VideoCache,
    videos: Sequence[VideoExamples],
    journals: Mapping[str, Journal],
    batch: int = 16,
    progress: Progress = silent,
) -> dict[str, str]:
    """Answer every example that the journals do not hold yet.

    Args:
        journals: one per condition: example id -> fields of
            :class:`~v2l_fast.generation.Answer`. Each batch is appended as soon as it is answered.
        batch: number of examples answered together.
        progress: called with (condition, answers so far, all answers), resumed answers included.

    Returns:
        Name -> reason of the videos that cannot be read. No condition answers their examples; the
        next run tries them again.
    """
    unreadable: dict[str, str] = {}
    questions = [(video, example) for video in videos for example in video.examples]
    done, total = 0, len(questions) * len(journals)
    for start in range(0, len(questions), batch):
        part = questions[start : start + batch]
        pending = {
            name: [q for q in part if q[1].id not in journal] for name, journal in journals.items()
        }
        for name, missing in pending.items():
            done += len(part) - len(missing)
            progress(name, done, total)
        for video in _distinct(q for missing in pending.values() for q in missing):
            try:
                cache.clip(video)
                cache.adapter(video)
            except VideoError as error:
                unreadable[video.name] = str(error)
        for name, missing in pending.items():
            ready = [q for q in missing if q[0].name not in unreadable]
            if ready:
                answers = _answer(name, cache, videos, ready, unreadable)
                journals[name].append(
                    {example.id: asdict(a) for (_, example), a in zip(ready, answers, strict=True)}
                )
            done += len(missing)
            progress(name, done, total)
    return unreadable


def _answer(
    condition: str,
    cache: VideoCache,
    videos: Sequence[VideoExamples],
    questions: Sequence[Question],
    unreadable: dict[str, str],
) -> list[Answer]:
    model, settings = cache.model, cache.settings
    prompts = [example.prompt for _, example in questions]
    limit = settings.max_new_tokens
    edge = None if settings.sampling is None else settings.sampling.longest_edge
    if condition == BASELINE:
        clips = [cache.clip(video) for video, _ in questions]
        return model.answer_direct(prompts, clips, edge, max_new_tokens=limit)
    adapters = {
        video.name: _adapter(condition, cache, videos, video, unreadable)
        for video in _distinct(questions)
    }
    return model.answer(
        prompts, [adapters[video.name] for video, _ in questions], max_new_tokens=limit
    )


def _distinct(questions: Iterable[Question]) -> list[VideoExamples]:
    return list({video.name: video for video, _ in questions}.values())


def _adapter(
    condition: str,
    cache: VideoCache,
    videos: Sequence[VideoExamples],
    video: VideoExamples,
    unreadable: dict[str, str],
) -> Adapter | None:
    if condition == NONE:
        return None
    if condition == BLANK:
        return cache.blank_adapter(video)
    if condition == OTHER:
        return _other_adapter(cache, videos, video, unreadable)
    adapter = cache.adapter(video)
    return adapter.prune(0) if condition == BIAS else adapter


def _other_adapter(
    cache: VideoCache,
    videos: Sequence[VideoExamples],
    video: VideoExamples,
    unreadable: dict[str, str],
) -> Adapter:
    """The adapter of the next readable video from another file, in the manifest's order (wrapping
    around)."""
    index = next(i for i, other in enumerate(videos) if other.name == video.name)
    for other in (*videos[index + 1 :], *videos[:index]):
        if other.path == video.path or other.name in unreadable:
            continue
        try:
            return cache.adapter(other)
        except VideoError as error:
            unreadable[other.name] = str(error)
    raise VideoError(
        f"{video.name}: no other video can be read whose adapter could answer as a control; "
        "use a manifest with at least two readable videos"
    )
