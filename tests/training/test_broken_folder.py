"""A folder with 5% broken videos trains to the end; each is listed with its reason."""

from __future__ import annotations

import json

import pytest

from tests import tiny
from tests.training.broken import REASONS, write_folder
from tests.training.tiny_run import settings
from v2l_fast.data.feature_cache import FeatureCache, fill_cache, vision_fingerprint
from v2l_fast.data.manifest import group_by_video, load_manifest
from v2l_fast.data.readers import ClipReader
from v2l_fast.training.trainer import train
from v2l_fast.video import FrameSampling

VIDEOS = 80


@pytest.fixture
def folder(tmp_path):
    """80 videos, one of each broken kind."""
    return write_folder(tmp_path / "videos", VIDEOS, tuple(REASONS))


def run(tmp_path, manifest, *overrides: str) -> dict:
    config = settings(
        tmp_path / "run", 'data.source="manifest"', f'data.manifests=["{manifest}"]',
        "data.val_share=0.0", "data.val_videos=0", "optim.steps=10", *overrides,
    )  # fmt: skip
    return train(config, backbone=tiny.backbone())


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_videos_are_listed_and_cost_nothing_else(tmp_path, folder, workers):
    manifest, broken = folder
    assert len(broken) / VIDEOS == 0.05
    summary = run(tmp_path, manifest, f"data.workers={workers}")
    assert summary["steps"] == 10
    lines = (tmp_path / "run/quarantine.jsonl").read_text().splitlines()
    actual = {line["video"]: line["reason"] for line in map(json.loads, lines)}
    assert actual.keys() == broken.keys() and len(lines) == 4
    for video, kind in broken.items():
        assert REASONS[kind] in actual[video]
    assert (tmp_path / "run/hypernet/model.safetensors").is_file()


def test_a_feature_cache_gives_the_same_weights(tmp_path, folder):
    """One video a step: the vision tower then sees the same views at once with and without."""
    manifest, _ = folder
    videos = group_by_video(load_manifest(manifest))
    backbone = tiny.backbone()
    cache = FeatureCache(
        tmp_path / "cache", ClipReader(FrameSampling(2, 32)), vision_fingerprint(backbone)
    )
    assert len(fill_cache(cache, backbone, videos)) == 4
    one = ("optim.batch_size=1", "optim.micro_batch_size=1")
    weights = []
    for name, options in (("plain", ()), ("cached", (f'data.feature_cache="{cache.folder}"',))):
        run(tmp_path / name, manifest, *one, *options)
        weights.append((tmp_path / name / "run/hypernet/model.safetensors").read_bytes())
    assert weights[0] == weights[1]
