"""Small copies of videos: the same frames at the same times, in a folder that survives anything."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import pytest

from tests.training.broken import REASONS, write_folder
from tests.video.clips import encode, set_display_matrix, shown_index
from v2l_fast.data import transcode as module
from v2l_fast.data.manifest import group_by_video, load_manifest, split_by_video, video_key
from v2l_fast.data.readers import ClipReader
from v2l_fast.data.shards import ShardError
from v2l_fast.data.teach import REQUIRED
from v2l_fast.data.transcode import TranscodeSettings, transcode
from v2l_fast.errors import ConfigError
from v2l_fast.video import FrameSampling, probe

SETTINGS = TranscodeSettings(longest_edge=64, threads=1)
READER = ClipReader(FrameSampling(6, 64))


def write_list(folder: Path, rows: list[dict]) -> Path:
    path = folder / "list.jsonl"
    defaults = {"task_type": "caption", "prompt": "Describe."}
    lines = [json.dumps({"id": f"e{n}", **defaults, **row}) for n, row in enumerate(rows)]
    path.write_text("\n".join(lines))
    return path


def copied(manifest: Path, settings: TranscodeSettings = SETTINGS):
    """The videos of a manifest and of its copies."""
    result = transcode(manifest, manifest.parent / "out", settings)
    assert not result.failures
    lists = (load_manifest(path, required=REQUIRED) for path in (manifest, result.manifest))
    return zip(*map(group_by_video, lists), strict=True)


def keyframes(path: str) -> list[int]:
    with av.open(path) as container:
        return [n for n, p in enumerate(container.demux(video=0)) if p.size and p.is_keyframe]


@pytest.mark.parametrize("rate", [10, Fraction(30000, 1001)])
def test_a_copy_has_the_spans_frames_times_and_duration(tmp_path, rate):
    encode(tmp_path / "a.mp4", 120, fps=rate, size=(160, 120))
    spans = [None, [1.5, 3.2], [0, 0.05], [2.05, 99]]
    rows = [{"video_path": "a.mp4", "metadata": {} if s is None else {"span": s}} for s in spans]
    for before, after in copied(write_list(tmp_path, rows)):
        assert after.span is None
        keys = keyframes(after.path)
        assert keys[0] == 0 and all(b - a <= rate + 1 for a, b in pairwise(keys))
        for chunks in (1, 2):
            parts = READER.read(before, chunks), READER.read(after, chunks)
            for clip, copy in zip(*parts, strict=True):
                assert clip.timestamps == copy.timestamps and clip.duration == copy.duration
                assert clip.frames.shape == copy.frames.shape
                shown = [[shown_index(f.movedim(0, -1).numpy()) for f in c.frames]
                         for c in (clip, copy)]  # fmt: skip
                assert shown[0] == shown[1]
                assert (clip.frames.float() - copy.frames.float()).abs().mean() < 3


def test_copies_are_upright_of_even_or_odd_size_and_never_larger(tmp_path):
    encode(tmp_path / "turned.mp4", 6, size=(160, 120))
    set_display_matrix(tmp_path / "turned.mp4", (0, 1, -1, 0))
    encode(tmp_path / "odd.mp4", 6, size=(33, 21), pix_fmt="yuv444p")
    rows = [{"video_path": "turned.mp4"}, {"video_path": "odd.mp4"}]
    sizes = []
    for before, after in copied(write_list(tmp_path, rows)):
        info = probe(after.path)
        sizes.append((info.width, info.height, info.rotation))
        (clip,), (copy,) = READER.read(before), READER.read(after)
        assert (clip.frames.float() - copy.frames.float()).abs().mean() < 6
    assert sizes == [(48, 64, 0), (33, 21, 0)]


def test_long_videos_are_copied_in_pieces(tmp_path, monkeypatch):
    encode(tmp_path / "a.mp4", 50)
    monkeypatch.setattr(module, "_PIECE", 7)
    ((_, after),) = copied(write_list(tmp_path, [{"video_path": "a.mp4"}]))
    (clip,) = ClipReader(FrameSampling(50, 64, exact_frames=True)).read(after)
    assert [shown_index(f.movedim(0, -1).numpy()) for f in clip.frames] == list(range(50))


def test_examples_keep_their_order_split_and_video(tmp_path):
    for name in "ab":
        encode(tmp_path / f"{name}.mp4", 40)
    rows = [
        {"video_path": f"{name}.mp4", "target_text": text, "metadata": {"span": span, "mine": 1}}
        for name, span, text in (("a", [0, 1], "x"), ("b", [0, 1], ""), ("a", [1, 3], "y"))
    ]
    manifest = write_list(tmp_path, [*rows, {**rows[0], "prompt": "Again."}])
    result = transcode(manifest, tmp_path / "out", SETTINGS)
    before, after = load_manifest(manifest, required=REQUIRED), load_manifest(
        result.manifest, required=REQUIRED
    )  # fmt: skip
    # The examples of a video stand together, as training groups them.
    assert [e.id for e in after] == ["e0", "e3", "e1", "e2"]
    assert len({e.path for e in after}) == 3 and result.videos == 3
    assert {video_key(e) for e in after} == {video_key(e) for e in before}
    for share in (0.3, 0.6):
        parts = [[sorted(e.id for e in part) for part in split_by_video(examples, share)]
                 for examples in (before, after)]  # fmt: skip
        assert parts[0] == parts[1]
    assert after[3].target_text == "y" and after[3].metadata == {
        "mine": 1, "video_id": "a.mp4", "original": {"video_path": "a.mp4", "span": [1, 3]},
    }  # fmt: skip


def test_unreadable_videos_are_left_out_and_a_run_continues(tmp_path, monkeypatch):
    manifest, _ = write_folder(tmp_path / "videos", 7, tuple(REASONS))
    out = tmp_path / "out"
    real, done = module.write_copy, []

    def stopping(video, target, settings):
        if len(done) == 2:
            raise KeyboardInterrupt
        real(video, target, settings)
        done.append(target.name)

    monkeypatch.setattr(module, "write_copy", stopping)
    with pytest.raises(KeyboardInterrupt):
        transcode(manifest, out, SETTINGS)
    assert not (out / "manifest.jsonl").exists()
    first = (out / "videos/000000.mp4").stat().st_mtime_ns
    done.clear()
    monkeypatch.setattr(module, "write_copy", real)
    progress = []
    result = transcode(manifest, out, SETTINGS, progress=lambda *at: progress.append(at))
    assert (out / "videos/000000.mp4").stat().st_mtime_ns == first
    assert progress[0] == (0, 7) and progress[-1] == (7, 7) and result.videos == 3
    reasons = {f.video: f.reason for f in result.failures}
    assert len(reasons) == 4 and all(
        any(text in reason for text in REASONS.values()) for reason in reasons.values()
    )
    assert sorted(p.name for p in (out / "videos").iterdir()) == [
        "000000.mp4", "000001.mp4", "000002.mp4",
    ]  # fmt: skip
    with pytest.raises(ShardError, match="made with longest_edge=64, now it is 32"):
        transcode(manifest, out, TranscodeSettings(longest_edge=32))


@pytest.mark.parametrize(
    "values", [{"longest_edge": 1}, {"longest_edge": 5000}, {"keyframe_seconds": 0.0},
               {"seconds": float("nan")}, {"threads": 0}],
)  # fmt: skip
def test_settings_out_of_range(values):
    with pytest.raises(ConfigError, match=f"{next(iter(values))} must be"):
        TranscodeSettings(**values)
