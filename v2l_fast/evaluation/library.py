"""The evaluated videos' clips and adapters, each made once.

Responsible for decoding, internalizing and keeping; with a folder, adapters outlive the process, so
that an interrupted evaluation internalizes no video again. What is asked of them is `answering`'s.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from v2l_fast.data.manifest import VideoExamples
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.model import Video2LoRA
from v2l_fast.video import Clip

Loader = Callable[[VideoExamples], Clip]


@dataclass(frozen=True)
class Settings:
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


class Library:
    """Clips and adapters of videos.

    Args:
        load: reads a video; its VideoError reaches the caller of ``clip`` and ``adapter``.
        folder: where adapters are kept, one file each; None keeps them in memory.
        clips: decoded clips kept at a time; at least as many as are asked about at once.
    """

    def __init__(
        self,
        model: Video2LoRA,
        settings: Settings,
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
