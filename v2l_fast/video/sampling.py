"""Which frames of a clip are used, and at what size: arithmetic only, no file is touched.

The default rule is transformers 4.51.3's `smolvlm_sample_indices_fn`, which the released
checkpoints were trained with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from v2l_fast.errors import ConfigError, VideoError

# Transformers 4.51.3 makes no frame larger, whatever is asked for.
MAX_EDGE = 4096


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video a model sees, and at what size.

    Attributes:
        max_frames, target_fps, exact_frames: as of :func:`sample_indices`.
        longest_edge: of a resized frame, in pixels, at most 4,096.

    Raises:
        ConfigError: a value is out of range.
    """

    max_frames: int
    longest_edge: int
    target_fps: float = 1.0
    exact_frames: bool = False

    def __post_init__(self) -> None:
        limits = {"max_frames": (1, math.inf), "longest_edge": (2, MAX_EDGE)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise ConfigError(f"{name} must be an integer, got {value!r}")
            if value < low:
                raise ConfigError(f"{name} must be at least {low}, got {value}")
            if value > high:
                raise ConfigError(f"{name} must be at most {high}, got {value}")
        if not 0 < self.target_fps < math.inf:
            raise ConfigError(f"target_fps must be a positive number, got {self.target_fps!r}")

    def override(
        self,
        max_frames: int | None = None,
        longest_edge: int | None = None,
        target_fps: float | None = None,
        exact_frames: bool | None = None,
    ) -> FrameSampling:
        """A copy in which arguments that are not None replace the values.

        Raises:
            ConfigError: a value is out of range.
        """
        return FrameSampling(
            self.max_frames if max_frames is None else max_frames,
            self.longest_edge if longest_edge is None else longest_edge,
            self.target_fps if target_fps is None else target_fps,
            self.exact_frames if exact_frames is None else exact_frames,
        )

    def indices(self, num_frames: int, fps: float, duration: float) -> np.ndarray:
        """:func:`sample_indices` of a source of ``duration`` seconds with these settings."""
        return sample_indices(
            num_frames,
            fps,
            duration,
            self.max_frames,
            self.target_fps,
            exact_frames=self.exact_frames,
        )


def sample_indices(
    num_frames: int,
    fps: float,
    duration: float,
    max_frames: int,
    target_fps: float = 1.0,
    skip_secs: float = 1.0,
    exact_frames: bool = False,
) -> np.ndarray:
    """Frame indices to decode, int64, sorted and unique.

    num_frames, fps, duration: of the source; duration in seconds.
    Default: k = max(1, min(round(target_fps * duration), max_frames)) indices evenly spaced over
    the clip, whose first and last `skip_secs` are left out when it is longer than
    2 * skip_secs + max_frames * target_fps seconds.
    exact_frames: min(max_frames, num_frames) indices over the whole clip whatever its duration, so
    a large `max_frames` gives every frame; target_fps and skip_secs are not used.

    Raises VideoError for a source without frames or length, ConfigError for max_frames < 1.
    """
    if max_frames < 1:
        raise ConfigError(f"max_frames must be at least 1, got {max_frames}")
    if num_frames < 1:
        raise VideoError(f"cannot sample a video of {num_frames} frames: it must hold at least one")
    if exact_frames:
        # Integer arithmetic: floating-point spacing could merge two neighbours.
        k = min(max_frames, num_frames)
        return np.arange(k, dtype=np.int64) * (num_frames - 1) // max(k - 1, 1)
    if not (math.isfinite(duration) and duration > 0 and math.isfinite(fps) and fps > 0):
        raise VideoError(f"cannot sample a video of duration {duration} s at {fps} frames/s")

    k = max(1, min(int(round(target_fps * duration)), max_frames))
    start, end = 0, num_frames - 1
    if skip_secs > 0 and duration - 2 * skip_secs > max_frames * target_fps:
        start = max(0, int(skip_secs * fps))
        end = min(int(num_frames - skip_secs * fps), num_frames - 1)
        if start >= end:
            start, end = 0, num_frames - 1
    return np.unique(np.linspace(start, end, k, dtype=np.int64))
