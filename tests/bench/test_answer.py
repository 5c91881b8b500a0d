"""Every way to answer one question: the answers agree before anything is timed."""

from __future__ import annotations

import pytest
import torch

from bench.models import SHAPES
from bench.runs import answer


@pytest.fixture(scope="module")
def question() -> answer.VideoQuestion:
    return answer.random_question(SHAPES["tiny"], "cpu", torch.float32)


@pytest.fixture
def one_differs(monkeypatch):
    """The merged adapter gives another answer."""
    ways = {name: lambda count: [1] for group in answer.AGREE for name in group}
    ways["adapter, merged"] = lambda count: [2]
    monkeypatch.setattr(answer, "_ways", lambda *_: ways)


def test_every_way_answers_alike_and_is_timed(question, monkeypatch):
    monkeypatch.setattr(answer, "weight_floor", lambda decoder: 2.0)
    record = answer.compare(question, new_tokens=4, seconds=0.0)
    assert record["passed"] and record["question_tokens"] == answer.QUESTION_TOKENS
    assert set(record["ways"]) == {name for group in answer.AGREE for name in group}
    for times in record["ways"].values():
        assert min(times.values()) > 0
        assert times["weight_floor_share"] == 2 * times["tokens_per_second"]


def test_the_floor_is_the_time_to_read_the_weights(question, monkeypatch):
    class Device:
        type = "cuda"

    decoder = question.backbone.decoder
    monkeypatch.setattr(type(decoder), "device", Device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    count = sum(p.numel() for p in decoder.text_model.layers.parameters())
    count += decoder.lm_head.weight.numel()
    bandwidth = answer.peak_of("A100").reachable_bandwidth
    assert answer.weight_floor(decoder) == pytest.approx(4 * count / bandwidth)


def test_no_times_where_answers_differ(question, one_differs):
    record = answer.compare(question, new_tokens=2, seconds=0.0)
    assert record["disagree"] == ["adapter, merged"]
    assert not record["passed"] and not record["ways"]


def test_rounding_is_no_error_once_the_ways_agreed(question, one_differs):
    assert answer.disagreeing(question, 12) == ["adapter, merged"]
    record = answer.compare(question, new_tokens=2, seconds=0.0, checked=True)
    assert record["passed"] and record["disagree"] == ["adapter, merged"] and record["ways"]


def test_without_peft_the_other_ways_remain(question, monkeypatch):
    monkeypatch.setattr(answer.importlib.util, "find_spec", lambda name: None)
    assert answer.disagreeing(question, 4) == []
