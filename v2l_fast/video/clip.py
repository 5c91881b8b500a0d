"""A clip ready for a model: sampled frames, when they are shown, and what they were taken from.

Responsible for what a clip is, and for clips of frames in memory; reading files is `spans`,
resizing for the vision tower is `preprocess`, the prompt is the backbone's.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch

from v2l_fast.errors import VideoError


@dataclass(frozen=True, eq=False)
class Clip:
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
    def from_frames(cls, frames: torch.Tensor, fps: float) -> Clip:
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
