"""Training data through DALI: the reader, its threads and the corpus, on DALI's CPU operator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.video.clips import encode
from v2l_fast.data.internalize import CorpusSettings, internalize_corpus
from v2l_fast.training.config import DataConfig
from v2l_fast.training.loader import EpochOrder, Quarantine, step_batches
from v2l_fast.training.sources import ManifestSource, manifest_sources
from v2l_fast.video.dali import shared_decoder
from v2l_fast.video.info import fallbacks

VP9 = {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime", "g": "20"}}


@pytest.fixture
def manifest(tmp_path) -> Path:
    """Six VP9 videos of different lengths, and one DALI's CPU operator has no decoder for."""
    rows = []
    for number in range(7):
        name = f"{number}.mp4"
        encode(tmp_path / name, 10 + number, **({} if number == 6 else VP9))
        rows.append({"id": str(number), "video_path": name, "prompt": "what ?",
                     "target_text": "bars", "task_type": "qa"})  # fmt: skip
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def data(manifest: Path, **changes) -> DataConfig:
    options = {"manifests": (str(manifest),), "val_share": 0.0, "max_frames": 4,
               "longest_edge": 32, "target_fps": 1.0, "exact_frames": True,
               "workers": 2}  # fmt: skip
    return DataConfig(**(options | changes))


def steps(manifest: Path, tmp_path: Path, source=None, **changes):
    """The samples of two steps of four videos, and the names of those put aside."""
    config = data(manifest, **changes)
    source = source or manifest_sources(config, tiny.backbone(), 0)[0]
    quarantine = Quarantine(tmp_path / f"{id(source)}.jsonl", len(source))
    batches = step_batches(source, EpochOrder(7, 4, 0), range(2), config, quarantine)
    return [batch.samples for batch in batches], int(quarantine.broken.sum())


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_are_those_of_pyav(manifest, tmp_path, workers):
    by_dali, left_out = steps(manifest, tmp_path, decoder="dali", workers=workers)
    by_pyav, _ = steps(manifest, tmp_path, decoder="pyav", workers=workers)
    assert left_out == 1
    reference = {sample.video: sample for step in by_pyav for sample in step}
    for actual in (sample for step in by_dali for sample in step):
        (one,), (other,) = actual.chunks, reference[actual.video].chunks
        assert torch.equal(one.ids, other.ids)
        difference = (one.pixels.int() - other.pixels.int()).abs().float()
        assert difference.mean() < 4 and one.pixels.dtype == torch.uint8


def test_threads_give_what_workers_give(manifest, tmp_path, monkeypatch):
    by_workers, _ = steps(manifest, tmp_path, decoder="dali")
    before = shared_decoder(torch.device("cpu")).num_batches
    monkeypatch.setattr(ManifestSource, "on_gpu", True)
    by_threads, left_out = steps(manifest, tmp_path, decoder="dali")
    # In this process, not in workers of it.
    assert shared_decoder(torch.device("cpu")).num_batches > before and left_out == 1
    for one, other in zip(by_threads, by_workers, strict=True):
        assert [s.video for s in one] == [s.video for s in other]
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a.chunks[0].pixels, b.chunks[0].pixels)


def test_decoder_is_checked(manifest):
    with pytest.raises(ValueError, match="decoder\n.*'auto', 'pyav'"):
        data(manifest, decoder="decord")


def test_a_corpus_by_dali(manifest, tmp_path):
    settings = CorpusSettings("shapes", device="cpu", decoder="dali", threads=3)
    fallbacks.clear()
    corpus = internalize_corpus(manifest, tmp_path / "store", settings)
    assert corpus.adapters == 6
    (failure,) = corpus.failures
    assert "6.mp4: DALI does not decode it: codec h264 on cpu" in failure.reason
