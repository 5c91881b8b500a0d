"""Display matrices: each of the eight right-angle ones, and how FFmpeg names their angle."""

from __future__ import annotations

import numpy as np
import pytest

from v2l_fast.video.info import Orientation

_ONE = 1 << 16


def matrix(a: int, b: int, c: int, d: int) -> bytes:
    entries = [a * _ONE, b * _ONE, 0, c * _ONE, d * _ONE, 0, 0, 0, 1 << 30]
    return np.array(entries, dtype=np.int32).tobytes()


@pytest.mark.parametrize(
    ("abcd", "rotation", "mirrored"),
    [
        ((1, 0, 0, 1), 0, False),
        ((0, 1, -1, 0), 90, False),
        ((-1, 0, 0, -1), 180, False),
        ((0, -1, 1, 0), 270, False),
        ((-1, 0, 0, 1), 0, True),
        ((1, 0, 0, -1), 180, True),
        ((0, 1, 1, 0), 270, True),
        ((0, -1, -1, 0), 90, True),
    ],
)
def test_right_angles(abcd, rotation, mirrored):
    orientation = Orientation.from_display_matrix(matrix(*abcd))
    assert (orientation.rotation, orientation.mirrored) == (rotation, mirrored)
    frame = np.arange(2 * 3 * 3).reshape(2, 3, 3)
    expected = np.rot90(frame[:, ::-1] if mirrored else frame, -rotation // 90)
    np.testing.assert_array_equal(orientation.apply(frame), expected)


def test_an_empty_matrix_changes_nothing():
    assert Orientation.from_display_matrix(bytes(36)) == Orientation()
