"""The self-check's sums are integers that every dtype holds, and one wrong element is seen."""

from __future__ import annotations

import importlib

import pytest
import torch

from csrc_triton import canary, reference

OPS = ("perceiver_attention", "rank_projection", "lora_linear")


@pytest.fixture
def plain_kernels(monkeypatch):
    """The reference in the kernels' place."""
    for op in OPS:
        kernels = importlib.import_module(f"csrc_triton.kernels.{op}")
        for name in (op, f"{op}_backward"):

            def call(*args, name=name, config=None):
                return getattr(reference, name)(*args)

            monkeypatch.setattr(kernels, name, call)


@pytest.mark.parametrize("name", canary.CANARIES)
def test_results_are_integers_that_bfloat16_holds(name, plain_kernels):
    found, expected = canary.CANARIES[name](torch.bfloat16, "cpu", False)
    assert all(f.dtype == torch.bfloat16 for f in found)
    for t in expected:
        assert torch.equal(t, t.round()) and t.abs().max() <= canary.LARGEST_INTEGER
    assert any(t.any() for t in expected)


def test_every_op_has_one():
    assert all(canary.of_op(op) for op in OPS)
    assert canary.of_op("lora_linear") == ["lora_linear", "lora_linear decoding"]


@pytest.mark.parametrize("wrong", [1.0, float("nan")])
def test_one_wrong_element_is_seen(wrong, plain_kernels, monkeypatch):
    kernels = importlib.import_module("csrc_triton.kernels.rank_projection")
    assert canary.wrong_elements("rank_projection", torch.float16, "cpu", small=True) == 0

    def broken(*args):
        a, b = reference.rank_projection(*args)
        b.view(-1)[5] += wrong
        return a, b

    monkeypatch.setattr(kernels, "rank_projection", broken)
    assert canary.wrong_elements("rank_projection", torch.float16, "cpu", small=True) == 1
