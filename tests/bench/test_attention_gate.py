"""The gate of forms of attend that nobody has run: right ones pass, and every fault is found."""

from __future__ import annotations

import pytest
import torch

from bench import attention_gate
from csrc_triton.perceiver_attention import kernels, reference
from tests.csrc_triton.gluon_stand_in import stand_in
from tests.csrc_triton.interpreter import interpreted

TILE = {"BLOCK_P": 128, "BLOCK_S": 128, "VAR": 0, "num_warps": 4, "num_stages": 2}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """In a dtype that Triton's interpreter computes right, each call twice."""
    monkeypatch.setattr(attention_gate, "REPEATS", 1)
    monkeypatch.setattr(attention_gate, "DTYPES", (torch.float16,))


def failures(tile=TILE) -> list[str]:
    return attention_gate.failures(tile, 16, "cpu", large=False)


def test_kernels_that_are_right_pass():
    with interpreted():
        assert failures() == []


def test_the_source_in_gluon_passes_on_its_stand_in():
    with interpreted(), stand_in():
        assert failures({**TILE, kernels.GLUON: 1}) == []


def one_row(out, lse):
    out[-1, -1] *= 1.1
    return out, lse


def rounded_lse(out, lse):
    return out, torch.where(lse.isneginf(), lse, lse + 0.1)


def sees_nothing(out, lse):
    return out, lse.masked_fill(lse.isneginf(), 0.0)


def not_a_number(out, lse):
    out[0, 0, 0] = torch.nan
    return out, lse


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (one_row, "relative error of a row"),
        (rounded_lse, "error of lse"),
        (sees_nothing, "other rows see nothing"),
        (not_a_number, "NaN"),
    ],
)
def test_every_fault_is_found(fault, reason, monkeypatch):
    def wrong(query, context, norm, *, config, plan):
        out, lse = reference.perceiver_attention(query, context, norm)
        return fault(out.clone(), lse.clone())

    monkeypatch.setattr(kernels, "perceiver_attention", wrong)
    assert any(reason in line for line in failures())


def test_bits_that_change_are_found(monkeypatch):
    calls = []

    def wrong(query, context, norm, *, config, plan):
        out, lse = reference.perceiver_attention(query, context, norm)
        calls.append(1)
        return out + (out.abs() * 1e-3 if len(calls) % 2 == 0 else 0), lse

    monkeypatch.setattr(kernels, "perceiver_attention", wrong)
    found = failures()
    assert found and all(line.endswith("other bits in a further run") for line in found)


def test_a_tile_selects_what_is_judged(monkeypatch):
    tiles = []

    def right(query, context, norm, *, config, plan):
        tiles.append(config)
        return reference.perceiver_attention(query, context, norm)

    monkeypatch.setattr(kernels, "perceiver_attention", right)
    assert failures({**TILE, kernels.GLUON: 1}) == []
    assert all(tile == {**TILE, kernels.GLUON: 1} for tile in tiles)
