"""Teacher targets: the frozen model's own answers, in shards that survive anything."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.training.broken import REASONS, write_folder
from v2l_fast.data import teach as teaching
from v2l_fast.data.manifest import load_manifest
from v2l_fast.data.readers import ClipReader
from v2l_fast.data.shards import ShardError, Shards
from v2l_fast.data.teach import TeacherSettings, teach
from v2l_fast.model import Video2LoRA
from v2l_fast.video import FrameSampling

SETTINGS = TeacherSettings(
    "shapes",
    ClipReader(FrameSampling(8, 48)),
    max_new_tokens=24,
    batch=3,
    videos_per_shard=2,
    device="cpu",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("videos")
    write_folder(path, 8, tuple(REASONS))
    return path


def test_targets_are_the_models_answers_with_the_video_in_context(folder, tmp_path):
    taught = teach(folder / "manifest.jsonl", tmp_path / "out", SETTINGS)
    examples = load_manifest(taught.manifest)
    assert taught.answers == len(examples) == 8
    model = Video2LoRA.from_pretrained("shapes", device="cpu")
    for example in examples:
        direct = model.ask_direct(
            example.prompt, example.path, max_frames=8, longest_edge=48, max_new_tokens=24
        )
        assert example.target_text == direct
        assert example.metadata["teacher"] == "shapes" and example.metadata["reference"]
    sources = load_manifest(folder / "manifest.jsonl")
    assert [e.path for e in examples] == [e.path for e in sources[:8]]


def test_unreadable_videos_are_quarantined_with_their_reason(folder, tmp_path):
    taught = teach(folder / "manifest.jsonl", tmp_path / "out", SETTINGS)
    lines = (tmp_path / "out/quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["video"] for line in lines] == [f.video for f in taught.failures]
    for kind, failure in zip(reversed(REASONS), taught.failures, strict=True):
        assert REASONS[kind] in failure.reason


def test_an_answer_that_reaches_the_limit_is_marked(folder, tmp_path):
    settings = replace(SETTINGS, max_new_tokens=2)
    examples = load_manifest(teach(folder / "manifest.jsonl", tmp_path, settings).manifest)
    captions = [e for e in examples if e.is_caption]
    assert captions and all(e.metadata["truncated"] for e in captions)


def test_a_run_goes_on_where_it_stopped(folder, tmp_path, monkeypatch):
    whole = teach(folder / "manifest.jsonl", tmp_path / "whole", SETTINGS)
    computed = []

    class Stopping(teaching.Teacher):
        def __call__(self, numbers):
            if len(computed) == 2:
                raise KeyboardInterrupt
            computed.append(list(numbers))
            return super().__call__(numbers)

    monkeypatch.setattr(teaching, "Teacher", Stopping)
    seen = []
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        teach(folder / "manifest.jsonl", out, SETTINGS, progress=lambda *at: seen.append(at))
    assert seen == [(0, 8), (2, 8), (4, 8)] and not (out / "manifest.jsonl").exists()
    monkeypatch.undo()
    again = teach(folder / "manifest.jsonl", out, SETTINGS, progress=lambda *at: seen.append(at))
    assert seen[3:] == [(4, 8), (6, 8), (8, 8)]
    assert computed == [[0, 1], [2, 3]]
    assert again.manifest.read_text() == whole.manifest.read_text()
    # Nothing is left to do, so no model is loaded.
    settings = replace(SETTINGS, device="no such device")
    assert teach(folder / "manifest.jsonl", out, settings).answers == whole.answers


def test_another_run_in_the_same_folder_is_refused(folder, tmp_path):
    teach(folder / "manifest.jsonl", tmp_path, SETTINGS)
    with pytest.raises(ShardError, match="made with max_frames=8, now it is 4 .and 1 more"):
        settings = replace(SETTINGS, max_new_tokens=9, reader=ClipReader(FrameSampling(4, 48)))
        teach(folder / "manifest.jsonl", tmp_path, settings)


def test_shards(tmp_path):
    shards = Shards.open(tmp_path, {}, 7, 3)
    assert len(shards) == 3 and list(shards.numbers(2)) == [6]
    with pytest.raises(ShardError, match="3 of 3 shards are not done"):
        list(shards.lines())
    # A half-written file has another name, so it is neither counted nor read.
    (tmp_path / "shards" / ".00001.jsonl.1234.part").write_text('{"n": ')
    shards.run(lambda numbers: [{"n": n} for n in numbers], lambda done, total: None)
    assert [line["n"] for line in shards.lines()] == list(range(7))
    shards.compute(0, pytest.fail)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ShardError, match="not JSON"):
        Shards.open(tmp_path, {}, 7, 3)
