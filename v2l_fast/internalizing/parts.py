"""A video as the parts that become adapters: read from its file, or a clip in memory divided.

Responsible for what is read of a video; nothing here knows a model.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from v2l_fast.errors import ConfigError
from v2l_fast.video import Clip
from v2l_fast.video.reading import Backend
from v2l_fast.video.spans import load_spans
from v2l_fast.video.splitting import split_clip

Video = str | os.PathLike | Clip


@dataclass(frozen=True)
class Part:
    """What becomes one adapter: a clip, and where it starts and ends in its video, as fractions."""

    clip: Clip
    place: tuple[float, float]


@dataclass(frozen=True)
class Reading:
    """How videos are read.

    Attributes:
        max_frames, target_fps, exact_frames: sampling of each part, see
            :func:`~v2l_fast.video.sample_indices`.
        longest_edge: resolution in pixels.
        chunks: parts of equal duration, as far as there are frames for them.
        decoder, device: what decodes (``backend`` of :func:`~v2l_fast.video.load_video`), and where
            the frames go.

    Raises:
        ConfigError: ``chunks`` is less than 1.
    """

    max_frames: int
    target_fps: float
    longest_edge: int
    exact_frames: bool
    chunks: int
    decoder: Backend
    device: torch.device

    def __post_init__(self) -> None:
        if self.chunks < 1:
            raise ConfigError(f"chunks={self.chunks} is no part of a video: use 1 or more")

    def clips(self, video: Video) -> list[Clip]:
        """The video's parts in the order of time; a clip's own frames are divided among them.

        Raises:
            VideoError: the file cannot be read.
        """
        if isinstance(video, Clip):
            return [video] if self.chunks == 1 else split_clip(video, self.chunks)
        return load_spans(
            video,
            None,
            self.chunks,
            self.max_frames,
            self.target_fps,
            exact_frames=self.exact_frames,
            backend=self.decoder,
            longest_edge=self.longest_edge,
            device=self.device,
        )

    def parts(self, video: Video) -> list[Part]:
        """:meth:`clips` with their places."""
        clips = self.clips(video)
        count = len(clips)
        return [Part(clip, (i / count, (i + 1) / count)) for i, clip in enumerate(clips)]
