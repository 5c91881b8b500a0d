"""What is known about a video file before its frames are decoded, and how its frames are turned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
