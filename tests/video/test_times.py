"""Rates, durations and times of files whose clock is missing, restarts or jumps."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.video.clips import shown_index
from v2l_fast.video import load_video, probe
from v2l_fast.video.packets import _steady

REORDERED = {"bf": "3", "g": "12"}


def times_of(path: Path, count: int) -> list[float]:
    """Times of a file, whose frames must be complete, in order and nondecreasing in time."""
    loaded = load_video(path, count, exact_frames=True)
    assert [shown_index(f.movedim(0, -1).numpy()) for f in loaded.frames] == list(range(count))
    assert all(a <= b for a, b in pairwise(loaded.presentation_times))
    return list(loaded.presentation_times)


@pytest.mark.parametrize(
    ("name", "codec"), [("a.avi", "libx264"), ("a.asf", "libx264"), ("b.avi", "mpeg4")]
)
def test_packets_with_decoding_times_only(clip, name, codec):
    path = clip(name, 30, codec=codec, options=REORDERED)
    assert times_of(path, 30) == pytest.approx([i / 10 for i in range(30)])


@pytest.mark.parametrize("fps", [10, 60])
@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.h264", "libx264"), ("a.hevc", "libx265"), ("a.m2v", "mpeg2video"), ("a.m4v", "mpeg4")],
)
def test_raw_streams_have_the_rate_of_their_headers(clip, name, codec, fps):
    if codec == "mpeg2video":
        fps += 15 * (fps == 10)  # The format has a list of rates, which lacks 10.
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    muxer = {"format": "m4v"} if name == "a.m4v" else {}
    path = clip(name, 40, codec=codec, fps=fps, options=options, **muxer)
    info = probe(path)
    assert (info.fps, info.duration) == (fps, pytest.approx(40 / fps))
    assert times_of(path, 40) == pytest.approx([i / fps for i in range(40)])


def test_a_raw_stream_without_a_rate_is_warned_about(clip, caplog):
    path = clip("a.mjpeg", 10, codec="mjpeg", pix_fmt="yuvj420p", fps=10)
    assert probe(path).fps == 25
    assert "states no frame rate, 25 frames/s are assumed" in caplog.text


@pytest.mark.parametrize(
    ("suffix", "codec", "fps"),
    [("ts", "libx264", 10), ("mpg", "mpeg2video", 25), ("mkv", "libx264", 10),
     ("webm", "libvpx-vp9", 10)],
)  # fmt: skip
def test_recordings_joined_byte_by_byte(clip, tmp_path, suffix, codec, fps):
    options = {"cpu-used": "8", "deadline": "realtime"} if codec == "libvpx-vp9" else REORDERED
    parts = [
        clip(f"{first}.{suffix}", 24, codec=codec, options=options, first=first, fps=fps)
        for first in ((0, 24) if suffix in ("mkv", "webm") else (0, 24, 48))
    ]  # FFmpeg does not read a third Matroska file.
    count = 24 * len(parts)
    path = tmp_path / f"joined.{suffix}"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    info = probe(path)
    assert (info.num_frames, info.fps, info.duration) == (count, fps, count / fps)
    assert times_of(path, count) == pytest.approx([i / fps for i in range(count)], abs=1.1 / fps)


@pytest.mark.parametrize("jump", [500.0, 94_000.0, 95_400.0])
def test_a_clock_that_jumps(clip, tmp_path, jump):
    early = clip("a.ts", 24)
    late = clip("b.ts", 24, first=24, mux_options={"output_ts_offset": str(jump)})
    path = tmp_path / "joined.ts"
    path.write_bytes(early.read_bytes() + late.read_bytes())
    assert (probe(path).fps, probe(path).duration) == (10, 4.8)
    assert times_of(path, 48)[-1] == pytest.approx(4.7, abs=0.11)


def test_pauses_are_not_jumps(clip):
    pts = [0, 10, 20, 700, 710, 720, 3000, 3010]
    for name in ("a.mp4", "a.mkv", "b.ts"):
        path = clip(name, 8, pts=pts if name != "b.ts" else [p // 4 for p in pts])
        scale = 100 if name != "b.ts" else 400
        assert times_of(path, 8) == pytest.approx([p / scale for p in pts], abs=0.02)


def test_steady_times():
    def steady(shown, decoded=None, keys=None, jumping=True):
        count = len(shown)
        decoded = decoded or shown
        keys = keys or [i == 0 for i in range(count)]
        times, restarts = _steady(shown, decoded, keys, 0.1, jumping)
        return None if times is None else times.tolist(), restarts

    assert steady([0, 1, 2, 3]) == ([0, 1, 2, 3], False)
    assert steady([0, 3, 1, 2, 4], [-1, 0, 1, 2, 3]) == ([0, 1, 2, 3, 4], False)
    restarted = [True, False, False, True, False, False]
    assert steady([0, 1, 2, 0, 1, 2], keys=restarted) == ([0, 1, 2, 3, 4, 5], True)
    assert steady([5, 6, 7, 1, 2, 3], keys=restarted) == ([5, 6, 7, 8, 9, 10], True)
    assert steady([0, 1, 2, 900, 901, 902]) == ([0, 1, 2, 3, 4, 5], False)
    assert steady([0, 1, 2, 900, 901, 902], jumping=False)[0] == [0, 1, 2, 900, 901, 902]
    assert steady([0, 1, 2, 10**6, 10**6 + 1, 10**6 + 2], jumping=False)[0] == [0, 1, 2, 3, 4, 5]
    assert steady([0, None, 2, None], [None] * 4)[0] == [0, 2, 2, 4]
    assert steady([None, None]) == (None, False)


def test_no_times_at_all(clip, monkeypatch):
    path = clip("a.avi", 5, codec="mpeg4")
    monkeypatch.setattr("v2l_fast.video.packets._steady", lambda *_: (None, False))
    loaded = load_video(path, 5, exact_frames=True)
    assert all(math.isnan(time) for time in loaded.presentation_times)
    assert np.isclose(loaded.fps, 10)
