"""Reading ahead: order, shares of processes, failures."""

import pytest

from tests import tiny
from tests.training.tiny_run import TinySource
from v2l_fast.training.config import DataConfig
from v2l_fast.training.loader import step_batches
from v2l_fast.training.quarantine import Quarantine
from v2l_fast.training.records import read_lines
from v2l_fast.training.sampler import EpochOrder

LIST = "quarantine.jsonl"


@pytest.fixture(scope="module")
def inputs():
    return tiny.backbone().inputs


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


def test_a_failure_costs_its_own_place_only(inputs, tmp_path):
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
        sorted((line["index"], line["reason"]) for line in read_lines(tmp_path / n / LIST))
        for n in "ab"
    ]
    assert lists[0] == lists[1] and len(lists[0]) == 2
