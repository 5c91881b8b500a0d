"""The CPU benchmark of lora_linear on one short shape, and that it claims nothing when wrong."""

from __future__ import annotations

import pytest
import torch

from bench import cpu


@pytest.mark.parametrize("adapters", [1, 2])
def test_both_orders_agree(adapters):
    rows = cpu.compare(examples=2, tokens=1, adapters=adapters, seconds=0.0)
    assert [row["direction"] for row in rows] == ["forward", "forward+backward"]
    for row in rows:
        assert row["correct"] and row["seconds_ratio"] > 0
        assert "WRONG" not in cpu.line(row)


def test_no_ratio_from_a_wrong_result(monkeypatch):
    right = cpu.lora_linear
    monkeypatch.setattr(cpu, "lora_linear", lambda x, *rest: right(torch.flip(x, (-1,)), *rest))
    for row in cpu.compare(examples=2, tokens=1, adapters=1, seconds=0.0):
        assert not row["correct"] and "seconds_ratio" not in row
        assert "WRONG" in cpu.line(row)
