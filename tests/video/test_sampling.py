"""Sampled indices: the reference's rule on a table of clips, and exact_frames."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from v2l_fast.errors import ConfigError, VideoError
from v2l_fast.video import sample_indices


@pytest.mark.parametrize(
    ("num_frames", "fps", "max_frames", "expected"),
    [
        # 60 s at 30: longer than 12 + 2 s, so its first and last second are skipped.
        (1800, 30.0, 12, [30, 188, 346, 504, 662, 820, 979, 1137, 1295, 1453, 1611, 1770]),
        (56, 8.0, 12, [0, 9, 18, 27, 36, 45, 55]),  # 7 s: seven frames, nothing skipped
        (90, 30.0, 12, [0, 44, 89]),  # 3 s
        (12, 30.0, 12, [0]),  # 0.4 s rounds to no frame, one is taken
        (1, 25.0, 12, [0]),
        (420, 30.0, 12, None),  # exactly 14 s: not longer than 12 + 2 s
        (4, 0.1, 12, [0, 1, 2, 3]),  # slower than one frame a second: duplicates go
    ],
)
def test_default_rule(num_frames, fps, max_frames, expected):
    indices = sample_indices(num_frames, fps, num_frames / fps, max_frames)
    assert indices.dtype == np.int64
    if expected is None:
        expected = np.linspace(0, num_frames - 1, max_frames, dtype=int)
    np.testing.assert_array_equal(indices, expected)


@given(
    st.integers(1, 10_000), st.floats(0.1, 240), st.integers(1, 2000), st.booleans(),
    st.floats(0.1, 60),
)  # fmt: skip
def test_indices_are_sorted_unique_and_inside(num_frames, fps, max_frames, exact, target_fps):
    indices = sample_indices(
        num_frames, fps, num_frames / fps, max_frames, target_fps, exact_frames=exact
    )
    assert 1 <= len(indices) <= max_frames
    assert (np.diff(indices) > 0).all()
    assert indices[0] >= 0 and indices[-1] < num_frames
    if exact:
        assert len(indices) == min(max_frames, num_frames)
        assert indices[0] == 0
        if len(indices) > 1:
            assert indices[-1] == num_frames - 1


def test_exact_frames_reach_every_frame():
    np.testing.assert_array_equal(
        sample_indices(1024, 25.0, 41.0, 1024, exact_frames=True), np.arange(1024)
    )
    np.testing.assert_array_equal(sample_indices(10, 25.0, 0.4, 4, exact_frames=True), [0, 3, 6, 9])


def test_nothing_to_sample():
    with pytest.raises(ConfigError, match="max_frames must be at least 1, got 0"):
        sample_indices(10, 1.0, 10.0, 0)
    with pytest.raises(VideoError, match="0 frames"):
        sample_indices(0, 1.0, 10.0, 4)
    with pytest.raises(VideoError, match="duration nan"):
        sample_indices(10, 1.0, float("nan"), 4)
