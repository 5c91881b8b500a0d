"""Batches of a run: order, shares of processes, workers, and videos that cannot be read."""

from types import SimpleNamespace

import pytest

from tests import tiny
from tests.tiny import json_lines
from tests.training.tiny_run import TinySource
from v2l_fast.data.readers import Failure
from v2l_fast.errors import ConfigError
from v2l_fast.training.config import DataConfig
from v2l_fast.training.loader import EpochOrder, Quarantine, check_shared_memory, step_batches

LIST = "quarantine.jsonl"


@pytest.fixture(scope="module")
def inputs():
    return tiny.backbone().prompt_builder


def names(inputs, tmp_path, workers=0, broken=(), steps=range(3), **share):
    """Video names by step and micro-batch."""
    source = TinySource(inputs, broken=frozenset(broken))
    quarantine = Quarantine(tmp_path / LIST, len(source))
    batches = step_batches(
        source, EpochOrder(13, 8, 0), steps, DataConfig(workers=workers), quarantine, **share
    )
    return [[[sample.video for sample in micro] for micro in b.micro_batches] for b in batches]


def test_shares_and_micro_batches_are_the_batch(inputs, tmp_path):
    whole = names(inputs, tmp_path)
    order = EpochOrder(13, 8, 0)
    assert whole == [[[f"video {i}" for i in order.batch(step)]] for step in range(3)]
    parts = [names(inputs, tmp_path, rank=r, processes=2, accumulation=2) for r in range(2)]
    for step in range(3):
        assert [len(micro) for part in parts for micro in part[step]] == [2, 2, 2, 2]
        assert [[v for part in parts for micro in part[step] for v in micro]] == whole[step]
    assert names(inputs, tmp_path, steps=range(2, 3)) == whole[2:]


def test_what_does_not_divide_the_batch_differs_by_one(inputs, tmp_path):
    whole = names(inputs, tmp_path)
    parts = [names(inputs, tmp_path, rank=r, processes=3, accumulation=3) for r in range(3)]
    for step in range(3):
        sizes = [[len(micro) for micro in part[step]] for part in parts]
        assert sizes == [[0, 1, 1], [1, 1, 1], [1, 1, 1]]
        assert [[v for part in parts for micro in part[step] for v in micro]] == whole[step]


def test_a_failure_costs_only_its_own_video(inputs, tmp_path):
    whole = names(inputs, tmp_path, processes=2, accumulation=2)
    left = names(inputs, tmp_path, broken=(1, 6), processes=2, accumulation=2)
    gone = {"video 1", "video 6"}
    assert left == [[[v for v in micro if v not in gone] for micro in step] for step in whole]
    assert left != whole


def test_workers_keep_the_order(inputs, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    here = names(inputs, tmp_path / "a", broken=(1, 6))
    assert names(inputs, tmp_path / "b", workers=2, broken=(1, 6)) == here
    # Which of two workers meets a broken video first, and so at which step, is not determined.
    lists = [
        sorted((line["index"], line["reason"]) for line in json_lines(tmp_path / n / LIST))
        for n in "ab"
    ]
    assert lists[0] == lists[1] and len(lists[0]) == 2


def test_an_epoch_shows_every_video_once():
    order = EpochOrder(videos=10, batch_size=4, seed=1)
    seen = [i for step in range(5) for i in order.batch(step)]
    assert sorted(seen[:10]) == list(range(10)) == sorted(seen[10:])
    assert seen[:10] != seen[10:]


def test_batches_cross_epochs_at_full_size():
    batch = EpochOrder(videos=3, batch_size=8, seed=1).batch(0)
    assert len(batch) == 8
    assert sorted(batch[:3]) == sorted(batch[3:6]) == [0, 1, 2]


def test_batches_depend_on_seed_and_step_alone():
    forward = EpochOrder(videos=7, batch_size=3, seed=5)
    batches = [forward.batch(step) for step in range(9)]
    again = EpochOrder(videos=7, batch_size=3, seed=5)
    assert [again.batch(step) for step in reversed(range(9))] == batches[::-1]
    assert EpochOrder(videos=7, batch_size=3, seed=6).batch(0) != batches[0]


def test_the_parts_of_processes_are_the_batch():
    order = EpochOrder(videos=20, batch_size=12, seed=0)
    for processes in (1, 2, 3, 5, 6, 7, 12):
        parts = [order.share(4, rank, processes) for rank in range(processes)]
        assert [i for part in parts for i in part] == order.batch(4)
        assert {len(part) for part in parts} == {12 // processes, -(-12 // processes)}


def test_processes_learn_from_each_other(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    first, second = Quarantine(path, 9), Quarantine(path, 9)
    first.add(4, Failure("clip.mp4", "is empty\nmore"), 3)
    second.refresh()
    assert second.broken.nonzero().flatten().tolist() == [4]
    second.add(4, Failure("clip.mp4", "is empty"), 5)
    second.add(7, Failure("other.mp4", ""), 6)
    assert len(first) == len(second) == 2
    assert json_lines(path) == [
        {"video": "clip.mp4", "reason": "is empty", "step": 3, "index": 4},
        {"video": "other.mp4", "reason": "unknown", "step": 6, "index": 7},
    ]
    assert first.broken.nonzero().flatten().tolist() == [4, 7]


def test_flags_are_seen_by_workers(tmp_path):
    assert Quarantine(tmp_path / "quarantine.jsonl", 3).broken.is_shared()


def test_shared_memory_is_checked_before_the_first_step(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=64 << 20))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    config = DataConfig(workers=3, prefetch=2)
    # 2 processes, 3 x 2 batches ahead and one in the step, 4 videos each.
    check_shared_memory(config, 4, (64 << 20) // 56, tmp_path)
    with pytest.raises(ConfigError, match=r"0.06 GiB free.*need 1.09 GiB.*--shm-size=2g"):
        check_shared_memory(config, 4, 20 << 20, tmp_path)
    check_shared_memory(DataConfig(workers=0), 4, 20 << 20, tmp_path)
    check_shared_memory(config, 4, 20 << 20, tmp_path / "missing")
