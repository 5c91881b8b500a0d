"""Files that are broken or not videos: a one-line error, or the frames that still decode."""

from __future__ import annotations

import os
import re
import time

import av
import numpy as np
import pytest

from tests.video.clips import picture, shown_index, write_silence
from v2l_fast.errors import VideoError
from v2l_fast.video import Limits, decode, load_video, probe
from v2l_fast.video.decoder import StreamDecoder


def error_of(path, limits: Limits | None = None) -> str:
    with pytest.raises(VideoError) as caught:
        load_video(path, max_frames=4, limits=limits)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def test_missing_file(tmp_path):
    assert "no such file" in error_of(tmp_path / "none.mp4")


def test_an_address_is_not_a_file():
    assert "no such file" in error_of("http://127.0.0.1:9/clip.mp4")


def test_directory(tmp_path):
    assert "a directory" in error_of(tmp_path)


def test_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    assert "not a regular file" in error_of(tmp_path / "pipe.mp4")


def test_empty_file(tmp_path):
    (tmp_path / "a.mp4").touch()
    assert "empty file" in error_of(tmp_path / "a.mp4")


def test_text_file(tmp_path):
    (tmp_path / "a.mp4").write_text("this is a letter, not a video\n" * 100)
    assert "not a video" in error_of(tmp_path / "a.mp4")


def test_random_bytes(tmp_path):
    (tmp_path / "a.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    error_of(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    "script",
    [
        "ffconcat version 1.0\nfile {name}\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{name}\n",
    ],
)
def test_scripts_that_open_other_files_are_refused(clip, tmp_path, script):
    other = clip("other.mp4", 2)
    (tmp_path / "a.mp4").write_text(script.format(name=other.name))
    assert "not a video" in error_of(tmp_path / "a.mp4")


def test_audio_only(tmp_path):
    write_silence(tmp_path / "a.mp4")
    assert "it holds audio, no video stream" in error_of(tmp_path / "a.mp4")


def test_index_missing(clip):
    path = clip("a.mp4", 30)
    path.write_bytes(path.read_bytes()[:-400])
    assert "moov" in error_of(path)


@pytest.mark.parametrize("keep", [0.4, 0.75])
def test_truncated_in_the_middle(clip, keep, caplog):
    path = clip("a.mp4", 60, options={"g": "10"}, mux_options={"movflags": "faststart"})
    whole = path.read_bytes()
    frames = whole.find(b"mdat")
    path.write_bytes(whole[: frames + int((len(whole) - frames) * keep)])
    loaded = load_video(path, max_frames=60, exact_frames=True)
    assert 1 < loaded.num_frames < 60
    assert loaded.indices.tolist() == list(range(loaded.num_frames))
    assert loaded.duration == pytest.approx(loaded.num_frames / 10)
    shown = [shown_index(f.movedim(0, -1).numpy()) for f in loaded.frames[:-1]]
    assert shown == list(range(loaded.num_frames - 1))
    assert "its header claims 60 frames" in caplog.text


def test_truncated_to_its_header(clip):
    path = clip("a.mp4", 60, mux_options={"movflags": "faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: data.find(b"mdat") + 4])
    error_of(path)


def test_truncated_webm(clip):
    path = clip("a.webm", 60, codec="libvpx-vp9", options={"g": "10", "cpu-used": "8"})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    loaded = load_video(path, max_frames=100, exact_frames=True)
    assert 1 < loaded.num_frames < 60


def test_damage_in_the_middle_costs_only_the_damaged_frames(clip):
    path = clip("a.mp4", 60, options={"g": "10"}, mux_options={"movflags": "faststart"})
    data = bytearray(path.read_bytes())
    middle = data.find(b"mdat") + (len(data) - data.find(b"mdat")) // 2
    data[middle : middle + 200] = bytes(200)
    path.write_bytes(data)
    loaded = load_video(path, max_frames=4, exact_frames=True)
    assert len(loaded.frames) == 4
    assert shown_index(loaded.frames[0].movedim(0, -1).numpy()) == 0


def test_packets_that_do_not_decode_are_detected(clip, caplog):
    path = clip("a.mov", 20, codec="mjpeg", pix_fmt="yuvj420p")
    data = bytearray(path.read_bytes())
    starts = [match.start() for match in re.finditer(b"\xff\xd8\xff", data)]
    assert len(starts) == 20
    data[starts[15] : data.find(b"moov") - 4] = bytes(data.find(b"moov") - 4 - starts[15])
    path.write_bytes(data)
    assert probe(path).num_frames == 20
    loaded = load_video(path, max_frames=20, exact_frames=True)
    assert loaded.num_frames == len(loaded.frames) == 15
    assert shown_index(decode(path, [19])[0].numpy()) == 14
    assert "only 15 of 20 frames decode" in caplog.text


def test_nothing_decodes(clip):
    path = clip("a.mov", 3, codec="mjpeg", pix_fmt="yuvj420p")
    data = bytearray(path.read_bytes())
    first, end = data.find(b"\xff\xd8\xff"), data.find(b"moov") - 4
    data[first:end] = bytes(end - first)
    path.write_bytes(data)
    assert "no frame can be decoded" in error_of(path)


def test_first_frame_decodes_and_then_nothing(clip, monkeypatch):
    path = clip("a.mp4", 3)
    monkeypatch.setattr(StreamDecoder, "group", lambda *_: (_ for _ in ()))
    assert "no frame can be decoded" in error_of(path)
    with pytest.raises(VideoError, match="no frame can be decoded"):
        decode(path, [1])


def test_bounds(clip, monkeypatch):
    path = clip("a.mp4", 30)
    assert "64x48 have more than 100 pixels" in error_of(path, Limits(max_pixels=100))
    assert "3 s long, more than 2 s" in error_of(path, Limits(max_duration=2))
    assert "3 frames were requested, more than 2" in error_of(path, Limits(max_frames=2))
    assert "more than 9999; pass longest_edge" in error_of(path, Limits(max_bytes=9999))

    clock = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    assert "more than 5 s" in error_of(path, Limits(max_seconds=5))


def test_indices_outside(clip):
    path = clip("a.mp4", 3)
    for indices, text in [([3], "3..3"), ([-1, 0], "-1..0"), ([], "none")]:
        with pytest.raises(VideoError, match=f"indices must be in 0..2, got {text}"):
            decode(path, indices)


def test_frame_size_that_changes(tmp_path):
    path = tmp_path / "a.ts"
    parts = []
    for size in ((64, 48), (32, 48)):
        part = tmp_path / f"{size[0]}.ts"
        with av.open(str(part), "w") as container:
            stream = container.add_stream("mpeg2video", rate=10)
            stream.width, stream.height = size
            stream.pix_fmt = "yuv420p"
            for _ in range(12):
                image = np.full((size[1], size[0], 3), 99, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))
        parts.append(part.read_bytes())
    path.write_bytes(b"".join(parts))
    with pytest.raises(VideoError, match="frame size changes from 64x48 to 32x48"):
        load_video(path, max_frames=100, exact_frames=True)


def tone(path, *, cover: bool) -> None:
    """Writes silence, with a cover picture if ``cover``."""
    with av.open(str(path), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=16000, layout="mono")
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 64, 48, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            image = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
            container.mux(picture.encode(image) + picture.encode(None))
        for i in range(8):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = 16000, i * 1024
            container.mux(sound.encode(frame))
        container.mux(sound.encode(None))


def test_a_song_with_its_cover(tmp_path):
    path = tmp_path / "a.m4a"
    tone(path, cover=True)
    assert "it holds audio and a cover picture, no video; pass a file" in error_of(path)


@pytest.mark.parametrize(
    ("start", "kind"),
    [(b"\x89PNG\r\n\x1a\n", "an image (PNG)"), (b"\xff\xd8\xff\xe0", "an image (JPEG)"),
     (b"RIFF\x10\0\0\0WEBPVP8 ", "an image (WebP)"), (b"RIFF\x10\0\0\0WAVEfmt ", "file (WAV)"),
     (b"ID3\x04", "an audio file (MP3)"), (b"\xff\xfb\x90", "an audio file (MP3)"),
     (b"fLaC", "an audio file (FLAC)"), (b"%PDF-1.7", "a PDF document"),
     (b"PK\x03\x04", "a ZIP archive"), (b"<!DOCTYPE html>", "a web page (HTML)")],
)  # fmt: skip
def test_what_people_pass_by_mistake_is_named(tmp_path, start, kind):
    path = tmp_path / "a.mp4"
    path.write_bytes(start + bytes(64))
    assert f"{kind}, not a video; pass a video file" in error_of(path)


def mux(path, *streams) -> None:
    """Writes streams of (codec, frames, size, default); the pictures count from 0."""
    with av.open(str(path), "w") as container:
        added = []
        for codec, count, size, default in streams:
            stream = container.add_stream(codec, rate=10)
            stream.width, stream.height = size
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.disposition = av.stream.Disposition.default if default else 0
            added.append((stream, count, size))
        for stream, count, size in added:
            for i in range(count):
                image = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24")
                container.mux(stream.encode(image))
            container.mux(stream.encode(None))


@pytest.mark.parametrize(
    "streams",
    [
        [("mjpeg", 1, (32, 16), True), ("libx264", 20, (64, 48), True)],
        [("libx264", 20, (96, 64), False), ("libx264", 20, (64, 48), True)],
        [("libx264", 20, (64, 48), True), ("libx264", 20, (32, 16), False)],
    ],
)
def test_the_best_stream_is_read(tmp_path, streams):
    path = tmp_path / "a.mkv"
    mux(path, *streams)
    info = probe(path)
    assert (info.num_frames, info.width, info.height) == (20, 64, 48)
    for indices in ([0, 7, 19], range(20)):
        assert [shown_index(frame.numpy()) for frame in decode(path, indices)] == list(indices)
    clip = load_video(path, 20, exact_frames=True)
    assert clip.frames.shape == (20, 3, 48, 64)
