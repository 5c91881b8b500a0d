"""A clip ready for a model: sampled frames, when they are shown, and their source.

Responsible for the clip itself and for clips of frames in memory. `reader` reads files,
`preprocess` resizes for the vision tower, and the VLM family writes the prompt.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from v2l_fast.errors import VideoError


@dataclass(frozen=True, eq=False)
class Clip:
    """Sampled frames and their provenance.

    Attributes:
        frames: uint8 [F, 3, H, W], upright RGB.
        indices: int64 [F], positions in presentation order.
        timestamps: seconds, index / fps; prompts state these (as in training of the released
            checkpoints).
        fps, duration, num_frames: of the decodable part of the source; duration in seconds.
        sha256: of the file's bytes, or of the frames if there is no file (path None); None if the
            file was read without hashing it. An adapter can only be generated from a hashed clip.
        presentation_times: seconds from the file's first frame at which it shows each frame. They
            differ from `timestamps` for variable frame rate; NaN where the file has no time, empty
            when unknown.
    """

    frames: torch.Tensor
    indices: np.ndarray
    timestamps: tuple[float, ...]
    fps: float
    duration: float
    num_frames: int
    sha256: str | None
    path: str | None
    presentation_times: tuple[float, ...] = ()

    @classmethod
    def from_frames(cls, frames: torch.Tensor | np.ndarray, fps: float) -> Clip:
        """A clip of all `frames`, shown at `fps` frames/s.

        Args:
            frames: uint8 [F, 3, H, W], F >= 1; an array may also be [F, H, W, 3].

        Raises:
            VideoError: another dtype or shape, or an fps that is not positive.
        """
        if isinstance(frames, np.ndarray):
            # Arrays are read with the channels first where only that fits, as tensors are.
            last = frames.ndim == 4 and frames.shape[-1] == 3 and frames.shape[1] != 3
            frames = np.ascontiguousarray(frames.transpose(0, 3, 1, 2) if last else frames)
            if frames.dtype != np.uint8:
                raise VideoError(f"frames must be uint8, got {frames.dtype} {list(frames.shape)}")
            frames = torch.from_numpy(frames)
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3:
            raise VideoError(
                f"frames must be uint8 [F, 3, H, W], got {frames.dtype} {list(frames.shape)}"
            )
        if frames.numel() == 0:
            raise VideoError(f"frames must not be empty, got shape {list(frames.shape)}")
        if not (math.isfinite(fps) and fps > 0):
            raise VideoError(f"fps must be a positive number, got {fps}")
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


def split_clip(clip: Clip, parts: int) -> list[Clip]:
    """Split a clip into `parts` consecutive clips of equal duration, at most one per frame.

    Their numbers of frames differ by at most one. As with `load_spans`, a part's times count from
    its start and its duration is its own; its `indices` remain those of the source.
    """
    groups = np.array_split(np.arange(len(clip.frames)), min(parts, len(clip.frames)))
    length = clip.duration / len(groups)
    return [
        replace(
            clip,
            frames=clip.frames[group],
            indices=clip.indices[group],
            timestamps=tuple(max(0.0, clip.timestamps[i] - number * length) for i in group),
            duration=length,
            num_frames=max(1, round(clip.num_frames / len(groups))),
            presentation_times=clip.presentation_times[group[0] : group[-1] + 1],
        )
        for number, group in enumerate(groups)
    ]
