"""How a coded frame must be turned to be shown upright, read from its display matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Orientation:
    """An upright frame is the coded one with its axes swapped (or not), then flipped per axis."""

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
        """True when no rotation alone does it."""
        return self.transpose ^ self.flip_x ^ self.flip_y

    @property
    def rotation(self) -> int:
        """Clockwise degrees, after a left-right mirroring when `mirrored`."""
        if self.transpose:
            return 90 if self.flip_x else 270
        return 180 if self.flip_y else 0

    def apply(self, frame: np.ndarray) -> np.ndarray:
        """View of `frame` [H, W, C] as it is to be shown."""
        if self.transpose:
            frame = frame.swapaxes(0, 1)
        return frame[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]
