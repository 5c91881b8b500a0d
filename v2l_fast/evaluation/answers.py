"""Every condition answers every example: same videos, prompts, frames and greedy decoding.

Responsible for who answers what, for the controls, and for picking up where an interrupted run
stopped. Scores are `report`'s and `judge`'s.

Conditions: the video in context (the baseline), its adapter (the system), and controls that tell
what an adapter's answer owes to the video: another video's adapter, the adapter of a black video,
the bias adapter that all videos share, and no adapter at all.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from v2l_fast.data.manifest import Example, VideoExamples
from v2l_fast.errors import VideoError
from v2l_fast.evaluation.journal import Journal
from v2l_fast.generation import Answer
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.model import Video2LoRA
from v2l_fast.video import Clip

BASELINE = "direct"
SYSTEM = "adapter"
OTHER = "another video's adapter"
BLANK = "black video's adapter"
BIAS = "bias adapter only"
NONE = "no adapter"
CONDITIONS = (BASELINE, SYSTEM, OTHER, BLANK, BIAS, NONE)

Question = tuple[VideoExamples, Example]
Report = Callable[[str, int], None]


def conditions_for(library: VideoCache, videos: Sequence[VideoExamples]) -> tuple[str, ...]:
    """The conditions that exist: there may be one video only, or no bias adapter."""
    left_out = set()
    if len({video.path for video in videos}) < 2:
        left_out.add(OTHER)
    if not library.model.config.bias_adapter:
        left_out.add(BIAS)
    return tuple(name for name in CONDITIONS if name not in left_out)


def answer_all(
    library: VideoCache,
    videos: Sequence[VideoExamples],
    journals: Mapping[str, Journal],
    batch: int = 16,
    report: Report = lambda condition, count: None,
) -> dict[str, str]:
    """Answer what the journals do not hold yet.

    Args:
        journals: one for each condition; entries are the fields of
            :class:`~v2l_fast.model.Answer` by example id.
        batch: examples answered at a time; after each batch its answers are kept.
        report: called with (condition, examples that now have its answer), those that were there
            before included.

    Returns:
        The videos that could not be read, by name, with the reason. Their examples are left out of
        every condition and tried again next time.
    """
    unreadable: dict[str, str] = {}
    questions = [(video, example) for video in videos for example in video.examples]
    for start in range(0, len(questions), batch):
        part = questions[start : start + batch]
        pending = {
            name: [q for q in part if q[1].id not in journal] for name, journal in journals.items()
        }
        for name, missing in pending.items():
            report(name, len(part) - len(missing))
        for video in _distinct(q for missing in pending.values() for q in missing):
            try:
                library.clip(video)
                library.adapter(video)
            except VideoError as error:
                unreadable[video.name] = str(error)
        for name, missing in pending.items():
            ready = [q for q in missing if q[0].name not in unreadable]
            if ready:
                answers = _answer(name, library, videos, ready, unreadable)
                journals[name].append(
                    {example.id: asdict(a) for (_, example), a in zip(ready, answers, strict=True)}
                )
            report(name, len(missing))
    return unreadable


def _answer(
    condition: str,
    library: VideoCache,
    videos: Sequence[VideoExamples],
    questions: Sequence[Question],
    unreadable: dict[str, str],
) -> list[Answer]:
    model, settings = library.model, library.settings
    prompts = [example.prompt for _, example in questions]
    limit = settings.max_new_tokens
    if condition == BASELINE:
        clips = [library.clip(video) for video, _ in questions]
        return model.answer_direct(prompts, clips, settings.longest_edge, max_new_tokens=limit)
    adapters = {
        video.name: _adapter(condition, library, videos, video, unreadable)
        for video in _distinct(questions)
    }
    chosen = [adapters[video.name] for video, _ in questions]
    return model.answer(prompts, chosen, max_new_tokens=limit)


def _distinct(questions: Iterable[Question]) -> list[VideoExamples]:
    return list({video.name: video for video, _ in questions}.values())


def _adapter(
    condition: str,
    library: VideoCache,
    videos: Sequence[VideoExamples],
    video: VideoExamples,
    unreadable: dict[str, str],
) -> Adapter | None:
    if condition == NONE:
        return None
    if condition == BLANK:
        return library.blank_adapter(video)
    if condition == OTHER:
        return _another(library, videos, video, unreadable)
    own = library.adapter(video)
    return own.prune(0) if condition == BIAS else own


def _another(
    library: VideoCache,
    videos: Sequence[VideoExamples],
    video: VideoExamples,
    unreadable: dict[str, str],
) -> Adapter:
    """The adapter of the next readable video of another file, in the manifest's order."""
    for other in _following(videos, video):
        if other.path == video.path or other.name in unreadable:
            continue
        try:
            return library.adapter(other)
        except VideoError as error:
            unreadable[other.name] = str(error)
    raise VideoError(
        f"{video.name}: there is no other readable video whose adapter could answer in its place; "
        "give a manifest of at least two videos"
    )


def _following(videos: Sequence[VideoExamples], video: VideoExamples) -> Iterator[VideoExamples]:
    start = next(i for i, v in enumerate(videos, start=1) if v.name == video.name)
    yield from videos[start:]
    yield from videos[: start - 1]


# --- library --------------------------------------------------------------------------------------


Loader = Callable[[VideoExamples], Clip]


@dataclass(frozen=True)
class AnswerSettings:
    """What every condition shares: frames, pixels and greedy decoding.

    None takes what the hypernetwork was trained with.
    """

    max_frames: int | None = None
    longest_edge: int | None = None
    exact_frames: bool = False
    max_new_tokens: int = 128


def blank(clip: Clip) -> Clip:
    """The same number, size and times of frames, all black."""
    sha256 = hashlib.sha256(b"blank").hexdigest()
    return replace(clip, frames=torch.zeros_like(clip.frames), sha256=sha256, path=None)


class VideoCache:
    """Clips and adapters of videos.

    Args:
        load: reads a video; its VideoError reaches the caller of ``clip`` and ``adapter``.
        folder: where adapters are kept, one file each; None keeps them in memory.
        clips: decoded clips kept at a time; at least as many as are asked about at once.
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
        """Its sampled frames. Raises VideoError when it cannot be read."""
        name = video.name
        if name not in self._clips:
            self._clips[name] = self._load(video)
        self._clips.move_to_end(name)
        if len(self._clips) > self._capacity:
            self._clips.popitem(last=False)
        return self._clips[name]

    def adapter(self, video: VideoExamples) -> Adapter:
        """Its adapter. Raises VideoError when it cannot be read."""
        return self._kept(video.name, lambda: self.clip(video))

    def blank_adapter(self, video: VideoExamples) -> Adapter:
        """The adapter of :func:`blank` frames in place of the video's; alike clips share it."""
        clip = self.clip(video)
        alike = f"blank {tuple(clip.frames.shape)} {clip.timestamps} {clip.duration}"
        return self._kept(alike, lambda: blank(clip))

    def _kept(self, key: str, make: Callable[[], Clip]) -> Adapter:
        if self._folder is None:
            if key not in self._adapters:
                self._adapters[key] = self._internalize(make())
            return self._adapters[key]
        path = self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        if path.exists():
            return self.model.load_adapter(path)
        adapter = self._internalize(make())
        self._folder.mkdir(parents=True, exist_ok=True)
        adapter.save(path)
        return adapter

    def _internalize(self, clip: Clip) -> Adapter:
        return self.model.internalize(
            clip,
            longest_edge=self.settings.longest_edge,
            exact_frames=self.settings.exact_frames,
        )
