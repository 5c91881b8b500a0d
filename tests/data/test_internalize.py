"""A manifest's videos in an adapter store: the model's own adapters, each once, resumable."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.golden import relative
from tests.training.broken import REASONS, write_folder
from v2l_fast.data import internalize as corpora
from v2l_fast.data.internalize import CorpusSettings, internalize_corpus
from v2l_fast.errors import ConfigError
from v2l_fast.model import Video2LoRA
from v2l_fast.pipeline import VideoInternalizer
from v2l_fast.store.adapter_store import AdapterStore, InternalizeSettings
from v2l_fast.video import frame_views
from v2l_fast.vlm.smolvlm import SmolVLM

SETTINGS = CorpusSettings("shapes", device="cpu", videos_per_shard=2)


@pytest.fixture
def manifest(tmp_path) -> Path:
    path, _ = write_folder(tmp_path / "videos", 7, tuple(REASONS))
    return path


def listed(corpus) -> list[dict]:
    return [json.loads(line) for line in corpus.listing.read_text().splitlines()]


def test_each_video_becomes_the_models_adapter_once(manifest, tmp_path):
    corpus = internalize_corpus(manifest, tmp_path / "store", SETTINGS)
    rows = listed(corpus)
    assert corpus.adapters == len(rows) == 3
    assert rows[0]["ids"] == ["clip-0000-caption", "clip-0000-qa"]
    for kind, failure in zip(reversed(REASONS), corpus.failures, strict=True):
        assert REASONS[kind] in failure.reason
    model = Video2LoRA.from_pretrained("shapes", device="cpu")
    store = AdapterStore(tmp_path / "store")
    for row in rows:
        alone = model.internalize(manifest.parent / row["video_path"])
        stored = store.get(row["adapter"])
        assert relative(stored.A["down_proj"], alone.A["down_proj"]) <= 1e-5
        assert stored.provenance == alone.provenance
        # A server that is given the same file answers from this adapter: the record decides, not
        # the factors' last bits, which depend on the batch.
        sha256 = alone.provenance["source"]["sha256"]
        assert store.find(sha256, InternalizeSettings.of(model)) == row["adapter"]


def test_it_goes_on_where_it_stopped(manifest, tmp_path, monkeypatch):
    done = []

    class Stopping(corpora.CorpusInternalizer):
        def __call__(self, numbers):
            if done:
                raise KeyboardInterrupt
            done.append(list(numbers))
            return super().__call__(numbers)

    monkeypatch.setattr(corpora, "CorpusInternalizer", Stopping)
    with pytest.raises(KeyboardInterrupt):
        internalize_corpus(manifest, tmp_path / "store", SETTINGS)
    assert len(AdapterStore(tmp_path / "store").list()) == 2
    monkeypatch.undo()
    seen = []
    corpus = internalize_corpus(
        manifest, tmp_path / "store", SETTINGS, progress=lambda *at: seen.append(at)
    )
    assert seen == [(2, 7), (4, 7), (6, 7), (7, 7)] and corpus.adapters == 3
    assert done == [[0, 1]]
    # All is there: no model is loaded.
    again = internalize_corpus(manifest, tmp_path / "store", replace(SETTINGS, device="none"))
    assert listed(again) == listed(corpus)


def test_a_span_is_not_taken_for_the_whole_video(tmp_path):
    path, _ = write_folder(tmp_path / "videos", 1)
    rows = [
        {"video_path": "clip-0000.mp4"},
        {"video_path": "clip-0000.mp4", "metadata": {"span": [0, 1]}},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole, part = listed(internalize_corpus(path, tmp_path / "store", SETTINGS))
    assert part["span"] == [0, 1] and whole["adapter"] != part["adapter"]
    store = AdapterStore(tmp_path / "store")
    source = store.get(part["adapter"]).provenance["source"]
    assert max(source["frame_indices"]) < 4 and source["duration"] == 1
    model = Video2LoRA.from_pretrained("shapes", device="cpu")
    actual = store.find(source["sha256"], InternalizeSettings.of(model))
    assert actual == whole["adapter"]


def test_batches_across_an_interruption(tmp_path, monkeypatch):
    """A folder begun with one batch size goes on with another."""
    path, _ = write_folder(tmp_path / "videos", 7, ("text",), different=7)
    settings = replace(SETTINGS, videos_per_shard=4, batch_size=3)
    taken = []
    internalize = VideoInternalizer.iter_internalize

    def watched(self, videos, *options):
        taken.append(len(videos))
        if len(taken) == 3:
            raise KeyboardInterrupt
        return internalize(self, videos, *options)

    monkeypatch.setattr(VideoInternalizer, "iter_internalize", watched)
    with pytest.raises(KeyboardInterrupt):
        internalize_corpus(path, tmp_path / "store", settings)
    assert taken == [3, 1, 3]
    corpus = internalize_corpus(path, tmp_path / "store", replace(settings, batch_size=2))
    assert taken == [3, 1, 3, 2, 1]
    assert [failure.video for failure in corpus.failures] == ["clip-0006.mp4"]
    model = Video2LoRA.from_pretrained("shapes", device="cpu")
    store = AdapterStore(tmp_path / "store")
    for number, row in enumerate(listed(corpus)):
        assert row["video_path"] == f"clip-{number:04d}.mp4"
        alone = model.internalize(path.parent / row["video_path"])
        assert relative(store.get(row["adapter"]).B["down_proj"], alone.B["down_proj"]) <= 1e-5
    assert corpus.adapters == number + 1 == 6


def test_a_video_without_finite_features_costs_its_batch_nothing(tmp_path, monkeypatch):
    path, _ = write_folder(tmp_path / "videos", 4)
    model = Video2LoRA.from_pretrained("shapes", device="cpu")
    clip = model.load_clip(path.parent / "clip-0001.mp4")
    views = frame_views(
        clip.frames, model.config.longest_edge, model.backbone.prompt_builder.tile_size
    )
    encode = SmolVLM.encode_views

    def overflowing(self, seen):
        features = encode(self, seen)
        features[(seen == views.views[0]).flatten(1).all(1)] = float("inf")
        return features

    monkeypatch.setattr(SmolVLM, "encode_views", overflowing)
    corpus = internalize_corpus(path, tmp_path / "store", replace(SETTINGS, videos_per_shard=4))
    assert [row["video_path"][-5] for row in listed(corpus)] == ["0", "2", "3"]
    (failure,) = corpus.failures
    assert failure.video == "clip-0001.mp4" and "clip-0001.mp4: the context" in failure.reason


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"decoder": "vlc"}])
def test_impossible_settings(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        CorpusSettings("shapes", **wrong)
