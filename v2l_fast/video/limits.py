"""Bounds on the cost of reading one video, so that a hostile or broken file fails early."""

from __future__ import annotations

import time
from dataclasses import dataclass

from v2l_fast.errors import VideoError


@dataclass(frozen=True)
class Limits:
    """Upper bounds for one call; exceeding one raises a VideoError that names it.

    max_pixels: width * height of a frame (the default is 8K, 7680 x 4320).
    max_duration: seconds of the whole clip.
    max_frames: frames returned.
    max_bytes: decoded RGB bytes returned (1,024 frames of 1080p are 6.4e9).
    max_seconds: wall-clock time of the call, opening included.
    """

    max_pixels: int = 7680 * 4320
    max_duration: float = 6 * 3600.0
    max_frames: int = 8192
    max_bytes: int = 8 << 30
    max_seconds: float = 600.0


class Deadline:
    """The wall-clock budget of one call on one file."""

    def __init__(self, path: str, seconds: float):
        self.path = path
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left, at least a millisecond (FFmpeg reads zero as "no limit")."""
        return max(self._end - time.monotonic(), 1e-3)

    def check(self) -> None:
        """Raise VideoError once the budget is spent."""
        if time.monotonic() > self._end:
            raise VideoError(
                f"{self.path}: reading took more than {self.seconds:g} s; "
                "shorten the clip or raise Limits.max_seconds"
            )
