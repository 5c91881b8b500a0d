"""A clip ready for a model: sampled frames, when they are shown, and what they were taken from.

Responsible for the whole way from a file (or frames in memory) to a VideoClip; resizing for the
vision tower is `preprocess`, the prompt is the backbone's.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from v2l_fast.errors import VideoError
from v2l_fast.video.limits import Limits
from v2l_fast.video.preprocess import resize_lanczos, resized_size
from v2l_fast.video.reading import Backend, open_source
from v2l_fast.video.sampling import sample_indices

if TYPE_CHECKING:
    from v2l_fast.video.pyav_source import Decoded


@dataclass(frozen=True, eq=False)
class VideoClip:
    """Sampled frames and their provenance.

    frames: uint8 [F, 3, H, W], upright RGB. indices: int64 [F], positions in presentation order.
    timestamps: seconds, index / fps, which is what prompts say (as the released checkpoints were
    trained); presentation_times: when the file shows each frame, seconds from its first frame,
    different for variable frame rate, NaN where the file does not say, empty when not known.
    fps, duration (seconds), num_frames: of the source, as far as it decodes. sha256: of the
    file's bytes, or of the frames when there is no file (path None).
    """

    frames: torch.Tensor
    indices: np.ndarray
    timestamps: tuple[float, ...]
    fps: float
    duration: float
    num_frames: int
    sha256: str
    path: str | None
    presentation_times: tuple[float, ...] = ()

    @classmethod
    def from_frames(cls, frames: torch.Tensor, fps: float) -> VideoClip:
        """Clip of all `frames` (uint8 [F, 3, H, W], F >= 1) shown at `fps` frames/s.

        Raises VideoError for another dtype or shape, or an fps that is not positive.
        """
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3:
            raise VideoError(
                f"frames are {frames.dtype} {list(frames.shape)}; pass uint8 [F, 3, H, W]"
            )
        if frames.numel() == 0:
            raise VideoError(f"frames of shape {list(frames.shape)} are empty; pass at least one")
        if not (math.isfinite(fps) and fps > 0):
            raise VideoError(f"fps={fps}: frames need a positive rate")
        frames = frames.detach().cpu().contiguous()
        digest = hashlib.sha256(repr((tuple(frames.shape), float(fps))).encode())
        digest.update(frames.numpy().data)
        count = len(frames)
        timestamps = tuple(i / fps for i in range(count))
        return cls(
            frames=frames,
            indices=np.arange(count, dtype=np.int64),
            timestamps=timestamps,
            fps=float(fps),
            duration=count / fps,
            num_frames=count,
            sha256=digest.hexdigest(),
            path=None,
            presentation_times=timestamps,
        )


def _shrink(image: torch.Tensor, longest_edge: int) -> torch.Tensor:
    """uint8 [H, W, 3] to the size `frame_views` would give it first, if that is smaller."""
    height, width = image.shape[:2]
    small = resized_size(height, width, longest_edge)
    # Only where the size rule maps the small size to itself would frame_views agree.
    if small[0] * small[1] >= height * width or resized_size(*small, longest_edge) != small:
        return image
    return resize_lanczos(image.permute(2, 0, 1), *small).permute(1, 2, 0)


def load_video(
    path: str | os.PathLike,
    max_frames: int,
    target_fps: float = 1.0,
    exact_frames: bool = False,
    limits: Limits | None = None,
    backend: Backend = "auto",
    longest_edge: int | None = None,
) -> VideoClip:
    """Sample (see `sample_indices`) and decode a file.

    longest_edge: shrink each frame as it is decoded to `resized_size(.., longest_edge)`, the first
    step of `frame_views`, whose result for the same longest_edge is unchanged; keeps memory small
    when many frames are taken.

    Where fewer frames decode than the file counts, sampling is done again over those that do.
    Raises VideoError as `probe` and `decode` do, ConfigError as `sample_indices` does.
    """
    source = open_source(path, backend, limits or Limits())
    info = source.info
    transform = None if longest_edge is None else partial(_shrink, longest_edge=longest_edge)

    def read(count: int) -> tuple[np.ndarray, Decoded]:
        indices = sample_indices(
            count, info.fps, count / info.fps, max_frames, target_fps, exact_frames=exact_frames
        )
        return indices, source.read(indices, transform)

    count = info.num_frames
    indices, decoded = read(count)
    if decoded.available is not None:
        count = decoded.available
        indices, decoded = read(count)
    with open(source.path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return VideoClip(
        frames=decoded.frames.permute(0, 3, 1, 2).contiguous(),
        indices=indices,
        timestamps=tuple(float(i / info.fps) for i in indices),
        fps=info.fps,
        duration=count / info.fps,
        num_frames=count,
        sha256=sha256,
        path=source.path,
        presentation_times=decoded.times,
    )
