"""Types that all readers share: a file's properties, bounds on the cost of reading, and fallbacks.

Nothing here needs a decoder library. `reader` chooses one, `container` opens files.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np

from v2l_fast.errors import VideoError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a file's video stream: FFmpeg's best one, cover pictures excluded.

    num_frames counts the packets of the stream that are shown, not what the header claims; packets
    that an edit list cuts away do not count. A frame index is a position in presentation order, for
    variable frame rate, too. Damaged packets may still fail to decode.
    fps: average frames/s; for a raw stream what its headers state, or 25 with a warning. A clock
    that restarts or jumps (joined recordings) counts as continuing.
    duration: num_frames / fps, seconds.
    width, height: as displayed, after rotation; non-square pixels are not stretched.
    rotation: clockwise degrees (0, 90, 180, 270) that decoding applies, after a left-right
    mirroring where `mirrored`.
    codec: FFmpeg's name. color_space: matrix coefficients ("bt709", "smpte170m", ...,
    "unspecified"). color_range: "tv" (16..235), "pc" (0..255) or "unspecified".
    """

    path: str
    num_frames: int
    fps: float
    duration: float
    width: int
    height: int
    rotation: int
    mirrored: bool
    codec: str
    color_space: str
    color_range: str


@dataclass(frozen=True)
class Orientation:
    """How a coded frame is turned upright: its axes swapped (or not), then flipped per axis."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @classmethod
    def from_display_matrix(cls, matrix: bytes) -> Orientation:
        """Nearest multiple of 90 degrees (and mirroring) of an ISO/IEC 14496-12 matrix.

        matrix: 9 native-endian int32, row vectors: x' = a x + c y, y' = b x + d y with
        (a, b, _, c, d) its first five entries, x to the right and y down.
        """
        a, b, _, c, d = np.frombuffer(matrix, dtype=np.int32, count=5).astype(np.int64).tolist()
        if abs(b) + abs(c) > abs(a) + abs(d):
            return cls(transpose=True, flip_x=c < 0, flip_y=b < 0)
        return cls(flip_x=a < 0, flip_y=d < 0)

    @property
    def mirrored(self) -> bool:
        """Whether a rotation alone does not suffice."""
        return self.transpose ^ self.flip_x ^ self.flip_y

    @property
    def rotation(self) -> int:
        """Clockwise degrees, after a left-right mirroring when `mirrored`."""
        if self.transpose:
            return 90 if self.flip_x else 270
        return 180 if self.flip_y else 0

    def apply(self, frame: np.ndarray) -> np.ndarray:
        """A view of `frame` [H, W, C] as it is shown."""
        if self.transpose:
            frame = frame.swapaxes(0, 1)
        return frame[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]


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


class Fallbacks:
    """Files that the chosen library left to PyAV: right frames, but slower. Thread-safe.

    Each file is logged and counted once, however often it is read. Each process counts its own:
    data workers do not add to their parent's count.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: set[str] = set()
        self._reasons: Counter[str] = Counter()

    def add(self, path: str, reason: str, detail: str = "") -> None:
        """Count `path` as read by PyAV. reason: one of a few; detail: specific to this file."""
        with self._lock:
            if path in self._seen:
                return
            self._seen.add(path)
            self._reasons[reason] += 1
        log.warning("%s: decoded by PyAV: %s%s", path, reason, f" ({detail})" if detail else "")

    def count(self) -> int:
        """Number of files."""
        return len(self._seen)

    def reasons(self) -> dict[str, int]:
        """Number of files by reason."""
        with self._lock:
            return dict(self._reasons)

    def clear(self) -> None:
        """Forget all files."""
        with self._lock:
            self._seen.clear()
            self._reasons.clear()


# Those of this process.
fallbacks = Fallbacks()
