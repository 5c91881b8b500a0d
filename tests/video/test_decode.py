"""Decoding by index: right frames, seeking equals decoding everything, orientation, odd files."""

from __future__ import annotations

import hashlib
import sys
import types

import pytest
import torch

from tests.video.clips import HEIGHT, WIDTH, set_display_matrix, shown_index
from v2l_fast.errors import VideoError
from v2l_fast.video import (
    Clip,
    FrameSampling,
    Limits,
    decode,
    fallbacks,
    frame_views,
    load_spans,
    load_video,
    probe,
)
from v2l_fast.video.decoder import StreamDecoder, _Lost
from v2l_fast.video.packets import Packets
from v2l_fast.video.pyav import PyAVSource


def shown(frames: torch.Tensor) -> list[int]:
    return [shown_index(f.numpy()) for f in frames]


def test_probe(clip):
    info = probe(clip("a.mp4", 25))
    assert (info.num_frames, info.fps, info.duration) == (25, 10.0, 2.5)
    assert (info.width, info.height, info.rotation, info.mirrored) == (WIDTH, HEIGHT, 0, False)
    assert info.codec == "h264"
    assert (info.color_space, info.color_range) == ("unspecified", "unspecified")


def test_color_tags(clip):
    tags = {"x264-params": "colormatrix=bt709:fullrange=on"}
    info = probe(clip("a.mp4", 2, options=tags))
    assert (info.color_space, info.color_range) == ("bt709", "pc")


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.webm", "libvpx-vp9"), ("b.webm", "libvpx"), ("a.avi", "mpeg4"),
     ("a.mov", "mjpeg"), ("a.ts", "libx264"), ("a.mkv", "libx265")],
)  # fmt: skip
def test_frames_are_the_requested_ones(clip, name, codec):
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = clip(name, 12, codec=codec, pix_fmt=pix_fmt)
    assert probe(path).num_frames == 12
    assert shown(decode(path, [0, 5, 11])) == [0, 5, 11]
    assert shown(decode(path, [7, 2, 7])) == [7, 2, 7]


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.avi", "mpeg4")])
def test_a_packet_table_saves_the_walk(clip, name, codec, monkeypatch):
    path = clip(name, 12, codec=codec)
    sampling = FrameSampling(5, 64, exact_frames=True)
    (expected,) = load_spans(path, sampling)
    table = PyAVSource(path, Limits()).packets.to_bytes()
    monkeypatch.setattr("v2l_fast.video.pyav.read_packets", None)
    (walked,) = load_spans(path, sampling, packets=Packets.from_bytes(table))
    assert torch.equal(walked.frames, expected.frames)
    assert walked.presentation_times == expected.presentation_times
    assert (walked.fps, walked.num_frames) == (expected.fps, expected.num_frames)


def test_hidden_vp8_frames_are_not_counted(clip):
    path = clip("a.webm", 40, codec="libvpx", options={"auto-alt-ref": "1", "lag-in-frames": "16"})
    assert probe(path).num_frames == 40
    assert shown(decode(path, [0, 39])) == [0, 39]


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"bf": "3", "x264-params": "open-gop=0"}),
        ("b.mp4", "libx264", {"bf": "3", "x264-params": "open-gop=1:b-pyramid=normal"}),
        ("a.mkv", "libx264", {"bf": "2"}),
        ("a.webm", "libvpx-vp9", {"cpu-used": "8", "deadline": "realtime"}),
        ("c.mp4", "libx265", {"x265-params": "open-gop=1:log-level=none", "preset": "ultrafast"}),
    ],
)
def test_sparse_reads_equal_the_whole(clip, name, codec, options):
    path = clip(name, 150, codec=codec, options=options | {"g": "30"})
    whole = decode(path, range(150))
    assert shown(whole) == list(range(150))
    for indices in ([1, 40, 41, 118, 149], [149], [59, 60], range(28, 122)):
        assert torch.equal(decode(path, indices), whole[list(indices)])


def test_a_misleading_seek_costs_only_time(clip, monkeypatch):
    path = clip("a.mp4", 150, options={"g": "30"})
    scan = StreamDecoder._scan
    calls = []

    def misleading_scan(self, key):
        calls.append(key)
        if len(calls) % 2:
            raise _Lost
        return scan(self, key)

    monkeypatch.setattr(StreamDecoder, "_scan", misleading_scan)
    assert shown(decode(path, [2, 140])) == [2, 140]
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("matrix", "rotation", "turns"),
    [((0, 1, -1, 0), 90, -1), ((-1, 0, 0, -1), 180, 2), ((0, -1, 1, 0), 270, 1)],
)
def test_rotated_phone_video(clip, matrix, rotation, turns):
    path = clip("a.mp4", 5)
    upright = decode(path, [0, 3])
    set_display_matrix(path, matrix)
    info = probe(path)
    size = (WIDTH, HEIGHT) if rotation == 180 else (HEIGHT, WIDTH)
    assert (info.rotation, info.width, info.height) == (rotation, *size)
    assert torch.equal(decode(path, [0, 3]), torch.rot90(upright, turns, (1, 2)))


def test_variable_frame_rate(clip):
    pts = [0, 10, 20, 120, 130, 400, 410, 420]
    path = clip("a.mp4", 8, pts=pts)
    loaded = load_video(path, max_frames=8, exact_frames=True)
    assert shown(loaded.frames.movedim(1, -1)) == list(range(8))
    assert loaded.presentation_times == pytest.approx([t / 100 for t in pts])
    assert loaded.timestamps == tuple(i / loaded.fps for i in range(8))
    assert loaded.duration == pytest.approx(4.3, abs=0.2)


def test_one_frame(clip):
    loaded = load_video(clip("a.mp4", 1), max_frames=12)
    assert loaded.frames.shape == (1, 3, HEIGHT, WIDTH)
    assert loaded.num_frames == 1 and loaded.timestamps == (0.0,)


def test_8k_frame(clip):
    path = clip("a.mp4", 1, codec="mpeg4", size=(7680, 4320), options={"qscale": "31"})
    info = probe(path)
    assert (info.width, info.height) == (7680, 4320)
    assert decode(path, [0]).shape == (1, 4320, 7680, 3)
    with pytest.raises(VideoError, match="7680x4320 have more than 8294400 pixels"):
        probe(path, Limits(max_pixels=3840 * 2160))


def test_load_video(clip):
    path = clip("a.mp4", 200)
    loaded = load_video(path, max_frames=4)
    assert loaded.indices.tolist() == [10, 70, 130, 190]
    assert shown(loaded.frames.movedim(1, -1)) == [10, 70, 130, 190]
    assert loaded.timestamps == (1.0, 7.0, 13.0, 19.0)
    assert (loaded.fps, loaded.duration, loaded.num_frames) == (10.0, 20.0, 200)
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.path == str(path)


def test_resizing_while_decoding_leaves_the_views_unchanged(clip):
    path = clip("a.mp4", 30, size=(162, 90))
    full = load_video(path, max_frames=3)
    small = load_video(path, max_frames=3, longest_edge=50)
    assert small.frames.shape == (3, 3, 28, 50)
    assert torch.equal(
        frame_views(small.frames, 50, 32).views, frame_views(full.frames, 50, 32).views
    )
    assert load_video(path, max_frames=3, longest_edge=400).frames.shape == full.frames.shape


def test_from_frames():
    frames = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).reshape(2, 3, 4, 5)
    clip = Clip.from_frames(frames, fps=4.0)
    assert clip.timestamps == (0.0, 0.25) and clip.duration == 0.5 and clip.num_frames == 2
    assert clip.indices.tolist() == [0, 1] and clip.path is None
    assert clip.sha256 == Clip.from_frames(frames.clone(), fps=4.0).sha256
    assert clip.sha256 != Clip.from_frames(frames, fps=5.0).sha256
    assert clip.sha256 != Clip.from_frames(frames.flip(0), fps=4.0).sha256
    assert clip.sha256 != Clip.from_frames(frames.reshape(2, 3, 5, 4), fps=4.0).sha256


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (torch.zeros(1, 3, 2, 2), 1.0, "must be uint8"),
        (torch.zeros(3, 2, 2, dtype=torch.uint8), 1.0, "must be uint8"),
        (torch.zeros(0, 3, 2, 2, dtype=torch.uint8), 1.0, "empty"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), 0.0, "fps must be a positive number, got 0.0"),
    ],
)
def test_from_frames_refuses(frames, fps, message):
    with pytest.raises(VideoError, match=message):
        Clip.from_frames(frames, fps)


def test_unknown_backend(clip):
    with pytest.raises(VideoError, match="a.mp4: backend must be one of .*, got 'decord'"):
        decode(clip("a.mp4", 1), [0], backend="decord")


def test_torchcodec_absent(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(VideoError, match="backend 'torchcodec' cannot be imported"):
        decode(clip("a.mp4", 1), [0], backend="torchcodec")


class FakeTorchcodec:
    """torchcodec's decoder interface over PyAV: coded orientation, as before 0.11."""

    metadata = types.SimpleNamespace()

    def __init__(self, path, dimension_order, seek_mode):
        assert (dimension_order, seek_mode) == ("NHWC", "exact")
        self.frames = decode(path, range(probe(path).num_frames))

    def __len__(self):
        return len(self.frames) - 1

    def get_frames_at(self, indices):
        return types.SimpleNamespace(
            data=self.frames[indices], pts_seconds=torch.tensor(indices) / 10
        )


def test_torchcodec_equals_pyav(clip, monkeypatch):
    path = clip("a.mp4", 40)
    module = types.SimpleNamespace(VideoDecoder=FakeTorchcodec)
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)
    indices = list(range(0, 39, 2))
    assert torch.equal(decode(path, indices, "torchcodec"), decode(path, indices, "pyav"))
    # The stand-in is one frame short: clamped, and sampled again.
    assert shown(decode(path, [39], "torchcodec")) == [38]
    loaded = load_video(path, max_frames=39, exact_frames=True, backend="torchcodec")
    assert loaded.num_frames == 39 and loaded.indices.tolist() == list(range(39))


def test_torchcodec_leaves_files_without_times_to_pyav(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(
        sys.modules, "torchcodec.decoders", types.SimpleNamespace(VideoDecoder=None)
    )
    path = clip("a.avi", 20, options={"bf": "3"})
    fallbacks.clear()
    assert shown(decode(path, range(20), "torchcodec")) == list(range(20))
    assert fallbacks.reasons() == {"packet times do not locate its frames": 1}
    fallbacks.clear()
