"""One rule for damaged files: a frame is the same whatever else is read with it, and a frame that
does not decode is replaced by the one before it."""

from __future__ import annotations

import random
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from tests.video.clips import encode, shown_index
from v2l_fast.errors import VideoError
from v2l_fast.video import Limits, decode, load_video, probe, pyav
from v2l_fast.video.decoder import StreamDecoder
from v2l_fast.video.pyav import PyAVSource

X265 = {
    "preset": "ultrafast",
    "x265-params": "keyint=12:min-keyint=12:scenecut=0:open-gop=0:log-level=none",
}
VP9 = {"g": "12", "cpu-used": "8", "deadline": "realtime"}
FILES = {
    "h264": ("a.mp4", "libx264", {"g": "12", "bf": "2"}),
    "open": ("a.mkv", "libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1"}),
    "hevc": ("a.mp4", "libx265", X265),
    "vp9": ("a.webm", "libvpx-vp9", VP9),
    "vp8": ("a.webm", "libvpx", VP9),
    "av1": ("a.mp4", "libsvtav1", {"preset": "12", "g": "12"}),
    "mpeg4": ("a.avi", "mpeg4", {"g": "12", "bf": "2"}),
    "mpeg2": ("a.ts", "mpeg2video", {"g": "12", "bf": "2"}),
}
COUNT = 48


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """Bytes of each file and (position, size) of its packets, encoded once."""
    files = {}

    def get(name: str):
        if name not in files:
            file, codec, options = FILES[name]
            path = encode(tmp_path_factory.mktemp(name) / file, COUNT, codec=codec, options=options)
            files[name] = path.suffix, path.read_bytes(), packets(path)
        return files[name]

    return get


def packets(path: Path) -> list[tuple[int, int]]:
    """(position, size) of their payloads, in the file's order."""
    data, end, places = path.read_bytes(), 0, []
    with av.open(str(path)) as container:
        for packet in container.demux(container.streams.video[0]):
            payload = bytes(packet)
            start = data.find(payload, end) if payload else -1
            if start >= 0:
                end = start + len(payload)
                places.append((start, len(payload)))
    return places or [(len(data) // 4, len(data) // 2)]  # A transport stream has no whole packets.


def damaged(data: bytes, where: list[tuple[int, int]], seed: int) -> bytes:
    """Flips bits, or zeroes or randomizes bytes, in one to three packets."""
    rng, out = random.Random(seed), bytearray(data)
    for _ in range(rng.choice((1, 1, 3))):
        position, size = rng.choice(where)
        if seed % 3 == 0:
            out[position : position + size] = bytes(size)
        elif seed % 3 == 1:
            out[position + rng.randrange(size)] ^= 1 << rng.randrange(8)
        else:
            start = position + rng.randrange(size)
            end = min(start + 40, position + size)
            out[start:end] = rng.randbytes(end - start)
    return bytes(out)


def read(path: Path, indices: list[int]) -> torch.Tensor | None:
    try:
        return decode(path, indices)
    except VideoError:
        return None


# Damage whose lost regions show the previous content of the decoder's buffers.
STALE_REGIONS = {"mpeg2": (121,), "vp8": (130, 152, 157)}


@pytest.mark.parametrize("name", FILES)
def test_frames_do_not_depend_on_cores_or_on_other_frames(healthy, tmp_path, monkeypatch, name):
    suffix, data, where = healthy(name)
    sparse = [0, 3, 11, 12, 23, 36, 44]
    for seed in (*range(6), *STALE_REGIONS.get(name, ())):
        path = tmp_path / f"{seed}{suffix}"
        path.write_bytes(damaged(data, where, seed))
        count = probe(path).num_frames
        whole = read(path, list(range(count)))
        if whole is None:
            continue
        few = [i for i in sparse if i < count]
        for cores in (1, 2, 16):
            monkeypatch.setattr(pyav, "_num_cores", lambda cores=cores: cores)
            assert torch.equal(read(path, list(range(count))), whole)
            assert torch.equal(read(path, few), whole[few])
        for index in few[1::2]:
            assert torch.equal(read(path, [index])[0], whole[index])


def zeroed(healthy, path: Path, name: str, numbers: list[int]) -> None:
    _, data, where = healthy(name)
    data = bytearray(data)
    for position, size in (where[i] for i in numbers):
        data[position : position + size] = bytes(size)
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["h264", "hevc", "vp9", "av1"])
def test_a_lost_group_is_replaced_by_the_frame_before_it(healthy, tmp_path, name):
    path = tmp_path / f"a{healthy(name)[0]}"
    zeroed(healthy, path, name, list(range(12, 24)))
    loaded = load_video(path, COUNT, exact_frames=True)
    shown = [shown_index(frame.movedim(0, -1).numpy()) for frame in loaded.frames]
    assert len(shown) == loaded.num_frames == COUNT
    assert shown[:11] == list(range(11)) and shown[24:] == list(range(24, COUNT))
    assert all(11 >= i >= 10 for i in shown[12:24])
    assert loaded.presentation_times == pytest.approx([i / 10 for i in range(COUNT)], abs=0.011)
    for index in (11, 12, 18, 23, 24):
        assert torch.equal(decode(path, [index])[0].movedim(-1, 0), loaded.frames[index])


def test_a_lost_beginning_does_not_exist(healthy, tmp_path):
    path = tmp_path / "a.mp4"
    zeroed(healthy, path, "h264", list(range(12)))
    loaded = load_video(path, COUNT, exact_frames=True)
    shown = [shown_index(frame.movedim(0, -1).numpy()) for frame in loaded.frames]
    assert shown == list(range(12, COUNT))


def test_a_lost_end_does_not_exist(healthy, tmp_path, caplog):
    path = tmp_path / "a.mp4"
    zeroed(healthy, path, "h264", list(range(36, COUNT)))
    loaded = load_video(path, COUNT, exact_frames=True)
    assert loaded.num_frames == 36
    last = decode(path, [COUNT - 1, 20])
    assert [shown_index(frame.numpy()) for frame in last] == [35, 20]
    assert f"only 36 of {COUNT} frames decode" in caplog.text


def test_one_lost_packet_near_the_end_costs_that_frame_alone(clip):
    path = clip("a.mp4", 100, options={"g": "10", "bf": "2"})
    data = bytearray(path.read_bytes())
    position, size = packets(path)[-3]
    data[position : position + size] = bytes(size)
    path.write_bytes(data)
    shown = [shown_index(frame.numpy()) for frame in decode(path, np.arange(100))]
    assert len(shown) == 100 and sum(a != b for a, b in enumerate(shown)) <= 3


@pytest.mark.parametrize("seed", range(8))
def test_skipping_unreferenced_pictures_changes_no_frame(tmp_path, monkeypatch, seed):
    """Five frames of an H.264 file with B-pictures, whole (seed 0) or damaged at random."""
    path = encode(tmp_path / "a.mp4", 60, options={"g": "30", "bf": "3", "b-pyramid": "normal"})
    rng = np.random.default_rng(seed)
    data = bytearray(path.read_bytes())
    start, end = data.find(b"mdat") + 4, data.find(b"moov")
    for position in rng.integers(start + (end - start) // 4, end, seed):
        data[position] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    indices = np.sort(rng.choice(60, 5, replace=False))
    reopen, decode_packet, decoded = StreamDecoder.reopen, StreamDecoder._decode, []

    def counted(self, packet):
        frames = decode_packet(self, packet)
        decoded[-1] += len(frames or ())
        return frames

    def never_skip(self):
        reopen(self)
        self.can_skip = False

    monkeypatch.setattr(StreamDecoder, "_decode", counted)
    results = []
    for change in (reopen, never_skip):
        monkeypatch.setattr(StreamDecoder, "reopen", change)
        decoded.append(0)
        results.append(PyAVSource(path, Limits()).read(indices))
    assert results[0].available == results[1].available
    assert torch.equal(results[0].frames, results[1].frames)
    assert decoded[0] < decoded[1] or seed
