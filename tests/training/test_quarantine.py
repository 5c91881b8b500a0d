"""Broken videos are listed once, whoever meets them."""

from v2l_fast.data.samples import Failure
from v2l_fast.training.quarantine import Quarantine
from v2l_fast.training.records import read_lines


def test_processes_learn_from_each_other(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    first, second = Quarantine(path, 9), Quarantine(path, 9)
    first.add(4, Failure("clip.mp4", "is empty\nmore"), 3)
    second.refresh()
    assert second.broken.nonzero().flatten().tolist() == [4]
    second.add(4, Failure("clip.mp4", "is empty"), 5)
    second.add(7, Failure("other.mp4", ""), 6)
    assert len(first) == len(second) == 2
    assert read_lines(path) == [
        {"video": "clip.mp4", "reason": "is empty", "step": 3, "index": 4},
        {"video": "other.mp4", "reason": "unknown", "step": 6, "index": 7},
    ]
    assert first.broken.nonzero().flatten().tolist() == [4, 7]


def test_flags_are_seen_by_workers(tmp_path):
    assert Quarantine(tmp_path / "quarantine.jsonl", 3).broken.is_shared()
