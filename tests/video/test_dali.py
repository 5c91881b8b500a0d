"""DALI's pipeline on its CPU operator: the frames of PyAV for the same files."""

from __future__ import annotations

import logging
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tests.video.clips import encode, set_display_matrix, shown_index
from tests.video.colors import INSIDE, PRIMARIES, centers, encode_patches
from v2l_fast.errors import VideoError
from v2l_fast.video import FrameSampling, Limits, dali, decode, load_spans, load_video, reader
from v2l_fast.video.dali import (
    DaliDecoder,
    DaliError,
    DaliSource,
    corrected,
    correction,
    shared_decoder,
    supported,
)
from v2l_fast.video.info import fallbacks

CPU = torch.device("cpu")
FAST_VP9 = {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime", "g": "20"}}
MJPEG = {"codec": "mjpeg", "pix_fmt": "yuvj420p"}
# swscale rounds, DALI rounds, and neither is the exact matrix.
LEVELS = 2
# A channel that BT.601 clips: half of what the correction can leave open (see :func:`corrected`).
CLIPPED_LEVELS = 19


@pytest.fixture(autouse=True)
def no_fallbacks_yet():
    fallbacks.clear()


@pytest.fixture
def on_the_cpu(monkeypatch):
    """`auto` as on a GPU: DALI for files it decodes exactly, PyAV for the others."""
    original = reader.open_source

    def source(path, backend, limits, device="cpu", packets=None):
        if backend == "auto":
            return DaliSource(path, limits, CPU, fallback=True)
        return original(path, backend, limits, device, packets)

    monkeypatch.setattr(reader, "open_source", source)


def shown(frames: torch.Tensor) -> list[int]:
    return [shown_index(f.numpy()) for f in frames]


def encoded(path) -> np.ndarray:
    return np.fromfile(path, dtype=np.uint8)


# --- indices and pixels ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "how"),
    [("a.webm", FAST_VP9), ("a.mp4", FAST_VP9), ("a.mov", MJPEG),
     # VP9 stores hidden reference frames inside the packets of shown ones.
     ("b.webm", {"codec": "libvpx-vp9", "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}}),
     ("c.mp4", FAST_VP9 | {"pts": [i * i for i in range(50)]})],
)  # fmt: skip
def test_frames_are_the_requested_ones(clip, name, how):
    path = clip(name, 50, **how)
    for requested in ([0, 5, 39, 49], [7, 2, 7], list(range(50))):
        assert shown(decode(path, requested, "dali")) == requested
    by_dali, by_pyav = (
        load_video(path, 6, exact_frames=True, backend=backend) for backend in ("dali", "pyav")
    )
    assert by_dali.indices.tolist() == by_pyav.indices.tolist()
    assert by_dali.presentation_times == by_pyav.presentation_times
    assert fallbacks.count() == 0


@pytest.mark.parametrize("color_range", ["tv", "pc"])
@pytest.mark.parametrize("space", ["", "bt470bg", "smpte170m", "bt709", "smpte240m", "bt2020nc"])
def test_colors_follow_the_tags(tmp_path, space, color_range):
    tags = {"color_range": color_range} | ({"colorspace": space} if space else {})
    inside = encode_patches(tmp_path / "inside.webm", INSIDE, tags)
    primaries = encode_patches(tmp_path / "primaries.webm", PRIMARIES, tags)
    for path, levels in ((inside, LEVELS), (primaries, CLIPPED_LEVELS)):
        result, expected = (centers(decode(path, [1], b)[0].numpy()) for b in ("dali", "pyav"))
        assert np.abs(result - expected).max() <= levels


def test_tags_matter(tmp_path):
    """The test above would pass if neither library read the tags."""
    rgb = {
        tags: centers(
            decode(
                encode_patches(tmp_path / f"{tags[0]}{tags[1]}.webm", INSIDE,
                               {"colorspace": tags[0], "color_range": tags[1]}), [1], "dali",
            )[0].numpy()
        )
        for tags in (("smpte170m", "tv"), ("bt709", "tv"), ("smpte170m", "pc"))
    }  # fmt: skip
    limited_601 = rgb["smpte170m", "tv"]
    assert np.abs(rgb["bt709", "tv"] - limited_601).max() > 2 * LEVELS
    assert np.abs(rgb["smpte170m", "pc"] - limited_601).max() > 2 * LEVELS


def test_jpeg_colors(tmp_path):
    path = encode(tmp_path / "a.mov", 3, size=(96, 96), **MJPEG)
    result, expected = (decode(path, [1], b)[0, 4:20, 4:20].int() for b in ("dali", "pyav"))
    assert (result - expected).abs().max() <= LEVELS


@pytest.mark.parametrize(
    ("space", "worst", "mean"), [("bt709", 19, 1.15), ("bt2020nc", 15, 0.76), ("smpte240m", 17, 1)]
)
def test_correction_over_all_colors(space, worst, mean):
    """The error that `corrected` states: every fifth level of each channel, DALI simulated."""
    levels = torch.arange(0, 256, 5, dtype=torch.float64)
    true = torch.cartesian_prod(levels, levels, levels)
    exact = true @ torch.from_numpy(np.linalg.inv(correction(space))).T
    decoded = exact.round().clamp(0, 255).to(torch.uint8)
    copy = decoded.clone()
    error = (corrected(decoded[None, None], space)[0, 0].double() - true).abs().amax(-1)
    assert torch.equal(decoded, copy)
    assert error.max() <= worst and error.mean() <= mean
    clear = ((exact > 0.5) & (exact < 254.5)).all(-1)
    assert error[clear].max() <= 1
    uncorrected = (decoded.double() - true).abs().amax(-1)
    assert uncorrected.mean() > 8 * error.mean()


def test_unsupported_color_space():
    assert supported("unspecified") and not supported("ycgco")


@pytest.mark.parametrize("matrix", [(0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (-1, 0, 0, 1)])
def test_rotation_is_honored(tmp_path, matrix):
    path = encode_patches(tmp_path / "a.mp4", INSIDE, {})
    set_display_matrix(path, matrix)
    result, expected = (decode(path, [0, 2], b)[:, 8:-8, 8:-8].int() for b in ("dali", "pyav"))
    assert result.shape == expected.shape
    # Between two patches chroma is interpolated.
    assert ((result - expected).abs() <= LEVELS).float().mean() > 0.9


def test_resizing_and_spans(clip):
    path = clip("a.webm", 40, **FAST_VP9, size=(128, 96))
    small, large = (load_video(path, 5, backend="dali", longest_edge=e) for e in (64, None))
    assert small.frames.shape[-2:] == (48, 64) and large.frames.shape[-2:] == (96, 128)
    parts = load_spans(
        path, FrameSampling(4, 4096, exact_frames=True), (1, 3), 2, backend="dali", resize=False
    )
    assert [shown(part.frames.movedim(1, -1)) for part in parts] == [[10, 13, 16, 19],
                                                                     [20, 23, 26, 29]]  # fmt: skip


def test_long_reads_are_split_into_calls(clip, monkeypatch):
    path = clip("a.webm", 30, **FAST_VP9)
    monkeypatch.setattr(dali, "_CALL_BYTES", 7 * 64 * 48 * 3)
    before = shared_decoder(CPU).num_batches
    assert shown(decode(path, range(30), "dali")) == list(range(30))
    assert shared_decoder(CPU).num_batches == before + 5


# --- batches --------------------------------------------------------------------------------------


def test_a_batch_of_different_files_and_lengths(clip):
    decoder = DaliDecoder(CPU, batch=4)
    files = [clip("a.webm", 40, **FAST_VP9), clip("b.mov", 20, **MJPEG, size=(32, 16)),
             clip("c.mp4", 9, **FAST_VP9)]  # fmt: skip
    requested = [[0, 30, 31], [19], [8, 1, 0, 4]]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            calls = [
                pool.submit(decoder, encoded(f), np.array(i, np.int32))
                for f, i in zip(files, requested, strict=True)
            ]
            result = [call.result() for call in calls]
            assert [shown(frames) for frames in result] == requested
            assert [tuple(frames.shape[1:3]) for frames in result] == [(48, 64), (16, 32), (48, 64)]


def test_calls_that_wait_share_a_batch(clip):
    decoder = DaliDecoder(CPU, batch=4)
    data = encoded(clip("a.webm", 30, **FAST_VP9))
    with ThreadPoolExecutor(9) as pool:
        with decoder._lock:
            calls = [pool.submit(decoder, data, np.array([i], np.int32)) for i in range(9)]
            while len(decoder._waiting) < 9:
                pass
        assert [shown(call.result()) for call in calls] == [[i] for i in range(9)]
    assert decoder.num_batches == 3


def test_a_broken_file_does_not_affect_its_batch(clip):
    decoder = DaliDecoder(CPU)
    good = encoded(clip("a.webm", 20, **FAST_VP9))
    bad = np.zeros(1000, np.uint8)
    with ThreadPoolExecutor(5) as pool:
        with decoder._lock:
            calls = [
                pool.submit(decoder, data, np.array([3], np.int32))
                for data in (good, bad, good, bad, good)
            ]
            while len(decoder._waiting) < 5:
                pass
        for number, call in enumerate(calls):
            if number % 2:
                with pytest.raises(DaliError, match="Failed to create video decoder"):
                    call.result()
            else:
                assert shown(call.result()) == [3]
    assert shown(decoder(good, np.array([19], np.int32))) == [19]


def test_frames_outlive_the_next_call(clip):
    path = clip("a.webm", 20, **FAST_VP9)
    first = decode(path, [1, 2], "dali")
    copy = first.clone()
    for i in range(5):
        decode(path, [i, 19 - i], "dali")
    assert torch.equal(first, copy)


# --- refusals and fallbacks -----------------------------------------------------------------------


def test_indices_out_of_range_are_refused(clip):
    path = clip("a.webm", 10, **FAST_VP9)
    for requested in ([10], [-1], []):
        with pytest.raises(VideoError, match=r"a\.webm: indices must be in 0\.\.9"):
            decode(path, requested, "dali")
    with pytest.raises(VideoError, match="frames beyond its end"):
        DaliSource(path, Limits(), CPU, fallback=False).read(np.array([3, 10]))


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "junk.webm"
    path.write_bytes(b"no video" * 100)
    with pytest.raises(VideoError, match=r"junk\.webm: not a video"):
        decode(path, [0], "dali")


@pytest.mark.parametrize(
    ("name", "how", "reason"),
    [("a.mp4", {}, "codec h264 on cpu"),
     ("a.webm", FAST_VP9 | {"pix_fmt": "yuv444p"}, "pixel format yuv444p"),
     ("b.webm", FAST_VP9 | {"size": (65, 48)}, "odd width or height"),
     ("a.avi", MJPEG, "packet times do not locate its frames")],
)  # fmt: skip
def test_files_that_dali_does_not_decode_exactly(clip, on_the_cpu, caplog, name, how, reason):
    path = clip(name, 8, **how)
    with pytest.raises(VideoError, match=f"DALI does not decode it: {reason}"):
        DaliSource(path, Limits(), CPU, fallback=False).read(np.array([1]))
    assert fallbacks.count() == 0
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert shown(decode(path, [1, 6])) == [1, 6]
    assert fallbacks.reasons() == {reason: 1}
    assert [r.message for r in caplog.records if reason in r.message] == [
        r.message for r in caplog.records if str(path) in r.message
    ]
    assert sum(str(path) in r.message for r in caplog.records) == 1


def test_a_failure_inside_dali_falls_back(clip, on_the_cpu, monkeypatch):
    path = clip("a.webm", 8, **FAST_VP9)

    def fails(*_):
        raise DaliError("Codec configuration not supported on this GPU. Codec: AV1")

    monkeypatch.setattr(dali, "shared_decoder", lambda device: fails)
    monkeypatch.setattr(dali, "_refused", set())
    assert shown(decode(path, [5])) == [5]
    assert fallbacks.reasons() == {"DALI failed": 1}
    # The codec is not tried again.
    other = clip("b.webm", 8, **FAST_VP9)
    assert shown(decode(other, [5])) == [5]
    assert fallbacks.reasons() == {"DALI failed": 1, "codec vp9 on cpu": 1}


def test_a_first_frame_that_differs_from_pyav_falls_back(clip, on_the_cpu, monkeypatch):
    path = clip("a.webm", 8, **FAST_VP9)
    # Like a decoder that takes the limited range for the full one.
    monkeypatch.setattr(
        dali, "corrected", lambda frames, _: (16 + frames * (219 / 255)).to(torch.uint8)
    )
    assert shown(decode(path, [5])) == [5]
    assert fallbacks.reasons() == {"its first frame differs from PyAV's": 1}


def test_a_truncated_file_is_read_as_by_pyav(clip, on_the_cpu):
    path = clip("a.webm", 60, **FAST_VP9)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    result, expected = (load_video(path, 8, exact_frames=True, backend=b) for b in ("auto", "pyav"))
    assert result.num_frames == expected.num_frames
    assert shown(result.frames.movedim(1, -1)) == shown(expected.frames.movedim(1, -1))


def test_auto_on_the_cpu_is_pyav(clip):
    path = clip("a.webm", 5, **FAST_VP9)
    assert torch.equal(decode(path, [3]), decode(path, [3], "pyav"))


def test_auto_for_a_gpu_is_dali(clip):
    path = clip("a.webm", 5, **FAST_VP9)
    source = reader.open_source(path, "auto", Limits(), "cuda")
    assert isinstance(source, DaliSource) and source.fallback
    assert not reader.open_source(path, "dali", Limits(), "cuda").fallback


def test_without_dali(clip, monkeypatch, caplog):
    monkeypatch.setattr(reader, "find_spec", lambda name: None)
    reader._has_dali.cache_clear()
    try:
        source = reader.open_source(clip("a.mp4", 2), "auto", Limits(), "cuda")
        assert not isinstance(source, DaliSource)
        assert sum("DALI is not installed" in r.message for r in caplog.records) == 1
    finally:
        reader._has_dali.cache_clear()
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(DaliError, match=r"cannot be imported.*v2l_fast\[dali\]"):
        DaliDecoder(CPU)


def test_a_gpu_that_does_not_exist(clip):
    path = clip("a.webm", 8, **FAST_VP9)
    missing = torch.device("cuda", 63)
    assert shown(DaliSource(path, Limits(), missing, fallback=True).read(np.array([5])).frames) == [
        5
    ]
    assert fallbacks.reasons() == {"DALI failed": 1}
    with pytest.raises(VideoError, match=r"a\.webm: DALI does not decode it: DALI failed \("):
        DaliSource(path, Limits(), missing, fallback=False).read(np.array([5]))


@pytest.mark.parametrize("device", ["cuda:1", "cpu"])
def test_dali_works_on_the_stream_of_pytorch(device, monkeypatch):
    """On one of its own it could write to a buffer that PyTorch still reads."""
    streams = []

    class Pipeline:
        def run(self, stream, encoded, indices):
            streams.append(stream)
            return (torch.zeros(len(encoded), 2, 4, 4, 3, dtype=torch.uint8),)

    monkeypatch.setattr(DaliDecoder, "_build", lambda self: Pipeline())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda which: f"stream of {which}")
    decoder = DaliDecoder(torch.device(device))
    assert decoder(np.zeros(3, np.uint8), np.arange(2, dtype=np.int32)).shape == (2, 4, 4, 3)
    assert streams == [None if device == "cpu" else f"stream of {device}"]
