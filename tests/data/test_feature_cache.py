"""Stored connector outputs: equal to computing them, whatever happens to the folder."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import tiny
from tests.training.broken import REASONS, write_folder
from tests.training.tiny_run import settings
from v2l_fast.data.feature_cache import (
    CacheError,
    FeatureCache,
    fill_cache,
    vision_fingerprint,
)
from v2l_fast.data.manifest import group_by_video, load_manifest
from v2l_fast.data.readers import ClipReader, Failure
from v2l_fast.errors import VideoError
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.pipeline import visual_features
from v2l_fast.training import trainer
from v2l_fast.training.config import DataConfig, TrainConfig
from v2l_fast.training.sources import ManifestSource, manifest_sources, worth_storing
from v2l_fast.training.step import TrainStep
from v2l_fast.training.trainer import train
from v2l_fast.video import FrameSampling
from v2l_fast.vlm.smolvlm import SmolVLM

READER = ClipReader(FrameSampling(4, 32))


@pytest.fixture
def videos(tmp_path):
    manifest, _ = write_folder(tmp_path / "videos", 5, ("text",))
    return group_by_video(load_manifest(manifest))


def cache_of(folder: Path, backbone, reader: ClipReader = READER) -> FeatureCache:
    return FeatureCache(folder, reader, vision_fingerprint(backbone))


def source(backbone, videos, cache=None, **options) -> ManifestSource:
    return ManifestSource(
        videos, backbone.prompt_builder, READER, tiny.CONFIG.instruction, cache=cache, **options
    )


@pytest.fixture
def unread(monkeypatch):
    """Call to make every decoding fail from then on."""

    def forbid() -> None:
        monkeypatch.setattr(
            ClipReader,
            "read",
            lambda *arguments, **options: pytest.fail("a stored video was decoded"),
        )

    return forbid


def test_training_is_equal_bit_for_bit_with_and_without(backbone, videos, tmp_path, unread):
    cache = cache_of(tmp_path / "cache", backbone)
    failures = fill_cache(cache, backbone, videos, chunks=(1, 2))
    assert [f.video for f in failures] == [videos[4].name] and len(cache) == 8
    assert REASONS["text"] in failures[0].reason
    plain = source(backbone, videos[:4], chunks=(1, 2))
    expected = [plain.load(i, step) for i in range(4) for step in (0, 1)]
    unread()
    stored = source(backbone, videos[:4], cache_of(tmp_path / "cache", backbone), chunks=(1, 2))
    actual = [stored.load(i, step) for i in range(4) for step in (0, 1)]
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.qa_pairs == theirs.qa_pairs and ours.frames == theirs.frames
        for mine, other in zip(ours.chunks, theirs.chunks, strict=True):
            assert mine.pixels is None and torch.equal(mine.ids, other.ids)
            assert mine.chunk_span == other.chunk_span
            assert torch.equal(mine.features, backbone.encode_views(other.pixels))
    results = [gradients(backbone, samples) for samples in (actual, expected)]
    assert torch.equal(results[0], results[1])


def gradients(backbone: SmolVLM, samples) -> torch.Tensor:
    network: HyperNetwork = tiny.hypernetwork()
    TrainStep(network, backbone)(samples).loss.backward()
    return torch.cat([p.grad.flatten() for p in network.parameters()])


@pytest.mark.parametrize(("edge", "rows"), [(32, 0), (64, 2)])
def test_frames_resized_by_the_models_device_give_the_same_features(backbone, videos, edge, rows):
    """Small frames travel in place of views; at twice the tower's size, frames are tiled."""
    reader = ClipReader(FrameSampling(4, edge))
    plain = replace(source(backbone, videos[:4], chunks=(1, 2)), reader=reader)
    small = replace(plain, resize_on_device=True)
    pairs = [(plain.load(i, 0), small.load(i, 0)) for i in range(4)]
    for before, after in pairs:
        assert before.frames == after.frames and before.qa_pairs == after.qa_pairs
        for views, frames in zip(before.chunks, after.chunks, strict=True):
            assert torch.equal(views.ids, frames.ids) and views.num_views == frames.num_views
            assert views.longest_edge is None and frames.longest_edge == edge
            assert frames.pixels.numel() <= views.pixels.numel()
            assert (len(views.pixels) > len(frames.pixels)) == (rows > 0)
    contexts = ([c for pair in pairs for c in pair[side].chunks] for side in (0, 1))
    for one, other in zip(*(visual_features(backbone, c) for c in contexts), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(*(gradients(backbone, [pair[side] for pair in pairs]) for side in (0, 1)))


def test_what_is_stored_is_not_computed_again(backbone, videos, tmp_path, unread):
    folder = tmp_path / "cache"
    fill_cache(cache_of(folder, backbone), backbone, videos[:4], videos_per_file=2)
    before = sorted(folder.iterdir())
    assert len(before) == 2
    unread()
    seen = []
    fill_cache(
        cache_of(folder, backbone), backbone, videos[:4],
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(4, 4)] and sorted(folder.iterdir()) == before


def test_an_interrupted_fill_keeps_its_whole_files(backbone, videos, tmp_path):
    folder = tmp_path / "cache"

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill_cache(cache_of(folder, backbone), backbone, videos, videos_per_file=2, progress=stop)
    assert len(cache_of(folder, backbone)) == 2
    fill_cache(cache_of(folder, backbone), backbone, videos)
    assert len(cache_of(folder, backbone)) == 4


def test_a_damaged_file_is_passed_over_and_stored_again(backbone, videos, tmp_path, caplog):
    folder = tmp_path / "cache"
    fill_cache(cache_of(folder, backbone), backbone, videos, videos_per_file=2)
    damaged = sorted(folder.iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:-10])
    (folder / f".{damaged.stem}.part").write_bytes(b"half")
    cache = cache_of(folder, backbone)
    assert len(cache) == 2 and f"{damaged}: not a complete feature file" in caplog.text
    fill_cache(cache, backbone, videos, videos_per_file=2)
    assert len(cache_of(folder, backbone)) == 4


def test_other_content_settings_and_models_are_not_confused(backbone, videos, tmp_path):
    folder = tmp_path / "cache"
    cache = cache_of(folder, backbone)
    fill_cache(cache, backbone, videos[:2])
    first = videos[0]
    assert cache.find(first, 1) and cache.find(first, 2) is None
    assert cache.find(replace(first, span=(0.0, 1.0)), 1) is None
    assert (
        cache_of(folder, backbone, replace(READER, sampling=FrameSampling(1, 32))).find(first, 1)
        is None
    )
    assert (
        cache_of(folder, backbone, replace(READER, sampling=FrameSampling(4, 64))).find(first, 1)
        is None
    )
    assert cache_of(folder, backbone, replace(READER, seconds=1.0)).find(first, 1)
    assert cache_of(folder, tiny.backbone(seed=1)).find(first, 1) is None
    # The same bytes under another name are the same video; other bytes under its name are not.
    moved = Path(first.path).with_name("moved.mp4")
    os.rename(first.path, moved)
    assert cache.find(replace(first, path=str(moved)), 1)
    Path(first.path).write_bytes(Path(videos[2].path).read_bytes())
    assert cache_of(folder, backbone).find(first, 1) is None
    assert cache.find(replace(first, path=str(tmp_path / "gone.mp4")), 1) is None


def test_the_fingerprint_is_of_the_vision_part_alone():
    backbone = tiny.backbone()
    before = vision_fingerprint(backbone)
    with torch.no_grad():
        backbone.model.lm_head.weight[0, 0] += 1
        assert vision_fingerprint(backbone) == before
        backbone.model.model.connector.modality_projection.proj.weight[0, 0] += 1
    assert vision_fingerprint(backbone) != before
    assert vision_fingerprint(SmolVLM(backbone.model.bfloat16(), backbone.tokenizer, "x")) != before


def test_workers_get_a_copy_that_opens_its_own_files(backbone, videos, tmp_path, unread):
    cache = cache_of(tmp_path / "cache", backbone)
    fill_cache(cache, backbone, videos[:2])
    reads = source(backbone, videos[:2], cache)
    expected = reads.load(0, 0)
    unread()
    again = pickle.loads(pickle.dumps(reads)).load(0, 0)
    assert torch.equal(again.chunks[0].features, expected.chunks[0].features)


def test_videos_that_are_not_stored_are_decoded(backbone, videos, tmp_path):
    cache = cache_of(tmp_path / "cache", backbone)
    fill_cache(cache, backbone, videos[:1])
    reads = source(backbone, videos, cache)
    assert reads.load(0, 0).chunks[0].pixels is None
    assert reads.load(1, 0).chunks[0].features is None
    assert isinstance(reads.load(4, 0), Failure)
    mixed, alone = (
        visual_features(backbone, [from_.load(i, 0).chunks[0] for i in (0, 1)])
        for from_ in (reads, source(backbone, videos))
    )
    for ours, theirs in zip(mixed, alone, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_cache_of_something_else_is_refused(backbone, videos, tmp_path):
    manifest = str(Path(videos[0].path).with_name("manifest.jsonl"))
    data = DataConfig(
        manifests=(manifest,), max_frames=4, longest_edge=32, target_fps=1.0,
        feature_cache=str(tmp_path / "cache"),
    )  # fmt: skip
    with pytest.raises(CacheError, match="none of its 0 entries"):
        manifest_sources(data, backbone, 0)
    fill_cache(cache_of(tmp_path / "cache", backbone), backbone, videos)
    train, _ = manifest_sources(data, backbone, 0)
    assert train.load(0, 0).chunks[0].features is not None
    with pytest.raises(CacheError, match="none of its 4 entries"):
        manifest_sources(replace(data, max_frames=3), backbone, 0)


# --- data.feature_cache=auto ----------------------------------------------------------------------


@pytest.fixture
def disk(monkeypatch):
    """Call to set the free bytes of every disk."""

    def free(size: float) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=size))

    return free


def run_settings(folder: Path, manifest: Path, *overrides: str) -> TrainConfig:
    return settings(
        folder, 'data.source="manifest"', f'data.manifests=["{manifest}"]', "data.val_share=0.3",
        "data.chunks=[1,2]", "optim.steps=4", "run.checkpoint_every=2", *overrides,
    )  # fmt: skip


def weights(folder: Path) -> bytes:
    return (folder / "hypernet/model.safetensors").read_bytes()


def test_features_are_stored_by_themselves_and_no_bit_depends_on_when(tmp_path, disk, monkeypatch):
    manifest, broken = write_folder(tmp_path / "videos", 9, ("text",))
    disk(1e9)
    names = ("cold", "warm", "stopped", "full", "off")
    cold, warm, stopped, full, off = (tmp_path / name for name in names)
    train(run_settings(cold, manifest), backbone=tiny.backbone())
    assert len(cache_of(cold / "features", tiny.backbone())) > 0
    lines = [json.loads(line) for line in (cold / "quarantine.jsonl").read_text().splitlines()]
    assert {line["video"] for line in lines} <= broken.keys()
    shutil.copytree(cold / "features", warm / "features")
    real = trainer._Run._log

    def stop(self, step, report):
        real(self, step, report)
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer._Run, "_log", stop)
    with pytest.raises(KeyboardInterrupt):
        train(run_settings(stopped, manifest), backbone=tiny.backbone())
    monkeypatch.setattr(trainer._Run, "_log", real)
    # A run that has begun with features goes on with them, and one without them without.
    disk(1)
    shutil.rmtree(stopped / "features")
    train(run_settings(stopped, manifest), backbone=tiny.backbone())
    train(run_settings(full, manifest), backbone=tiny.backbone())
    disk(1e9)
    monkeypatch.setattr(ClipReader, "read", refuse_all)
    train(run_settings(warm, manifest), backbone=tiny.backbone())
    monkeypatch.undo()
    assert weights(cold) == weights(warm) == weights(stopped)
    train(run_settings(off, manifest, 'data.feature_cache="off"'), backbone=tiny.backbone())
    assert weights(full) == weights(off)
    assert not (full / "features").exists() and not (off / "features").exists()


def refuse_all(self, video, chunks=1, hash_file=True):
    raise VideoError(f"{video.path}: not a video")


@pytest.mark.parametrize(
    ("steps", "share", "stores", "reason"),
    [(1, 2.1, False, "no video is read more than once"), (9, 2.1, True, "read 9.0 times"),
     (9, 1.9, False, "more than half of the free space")],
)  # fmt: skip
def test_what_auto_decides(backbone, videos, tmp_path, disk, steps, share, stores, reason):
    train_part = source(backbone, videos[:4], chunks=(1, 2), feature_bytes=100)
    # 4 videos in one and in two chunks of 4 frames each.
    need = 4 * (1 + 2) * 4 * 100
    assert train_part.stored_bytes == need
    disk(share * need)
    config = settings(tmp_path, f"optim.steps={steps}", "optim.batch_size=4")
    decision, line = worth_storing(config, train_part, None)
    assert decision is stores and reason in line
