"""The forms of lora_linear's product over W in Triton's interpreter, and that data chooses."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from csrc_triton import device, lora_linear
from csrc_triton.lora_linear import gemm as lora_gemm
from csrc_triton.lora_linear import kernels, reference
from tests.csrc_triton import checks
from tests.csrc_triton.kernels.test_lora_linear import of_form, tiled
from tests.csrc_triton.test_lora_linear import SCALE, frozen, inputs, oracle_of, packed

DTYPES = [torch.float32, torch.float16]
FUSED = ["epilogue", "recompute"]


@pytest.fixture(autouse=True)
def kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V2L_BACKEND", "triton")
    for name in ("lora_linear", "lora_linear_backward"):
        monkeypatch.delattr(reference, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FUSED)
@pytest.mark.parametrize("tokens", [5, 17, 33])
def test_many_tiles_and_ragged_ranks(tokens, form, dtype):
    sizes = {"d_in": 70, "d_out": 41}
    index, ranks = [2, -1, 0, 2], [20, 0, 7]
    checks.assert_equals_oracle(
        tiled(*frozen(**sizes), index, ranks, tiles=of_form(form)),
        oracle_of(*frozen(**sizes), index, ranks),
        inputs(e=4, t=tokens, n=3, r=20, **sizes),
        dtype,
    )


@pytest.mark.parametrize("form", FUSED)
@pytest.mark.parametrize("r", [1, 8, 16, 32, 48])
def test_ranks(r, form):
    weight, _ = frozen()
    index = [1, 0, 1]
    checks.assert_equals_oracle(
        tiled(weight, None, index, tiles=of_form(form)),
        oracle_of(weight, None, index),
        inputs(r=r),
        torch.float32,
    )


@pytest.mark.parametrize("form", FUSED)
def test_odd_widths(form):
    tile = {"BLOCK_T": 16, "BLOCK_N": 256, "BLOCK_K": 256, "BLOCK_R": 16}
    tile |= {"num_warps": 4, "num_stages": 2}
    index = [2, 0]
    checks.assert_equals_oracle(
        tiled(*frozen(2049, 31), index, tiles={**of_form(form), form: tile}),
        oracle_of(*frozen(2049, 31), index),
        inputs(e=2, t=3, n=3, d_in=2049, d_out=31),
        torch.float32,
    )


@pytest.mark.parametrize("form", FUSED)
@pytest.mark.parametrize("lengths", [[5, 3, 4], [33, 0, 16], [1, 0, 129]])
def test_packed_examples(lengths, form):
    weight, bias = frozen()
    index = [1, -1, 1]
    x, lora_a, lora_b = inputs(t=max(lengths))
    rows, offsets = packed(x, lengths)
    dense = oracle_of(weight, bias, index)

    def oracle(rows, lora_a, lora_b):
        padded = [F.pad(part, (0, 0, 0, max(lengths) - len(part))) for part in rows.split(lengths)]
        return packed(dense(torch.stack(padded), lora_a, lora_b), lengths)[0]

    checks.assert_equals_oracle(
        tiled(weight, bias, index, offsets=offsets, tiles=of_form(form)),
        oracle,
        [rows, lora_a, lora_b],
        torch.float32,
    )


@pytest.mark.parametrize("form", FUSED)
def test_unused_slots_are_never_read(form):
    ranks = [3, 0, 17]
    x, lora_a, lora_b = inputs(n=3, r=20)
    for i, rank in enumerate(ranks):
        lora_a[i, rank:], lora_b[i, rank:] = float("nan"), float("inf")
    checks.assert_equals_oracle(
        tiled(*frozen(), [0, 1, 2], ranks, tiles=of_form(form)),
        oracle_of(*frozen(), [0, 1, 2], ranks),
        [x, lora_a, lora_b],
        torch.float32,
    )


@pytest.mark.parametrize("form", FUSED)
def test_layouts_do_not_matter(form):
    index = [0, -1, 1]
    weight, bias = (t.float() for t in frozen())
    weight = weight.T.contiguous().T
    x, *factors = (t.float() for t in inputs())
    factors = [t.mT.contiguous().mT for t in factors]
    op = tiled(weight, bias, index, tiles=of_form(form))
    for turned in (x.mT.contiguous().mT, x.transpose(0, 1).contiguous().transpose(0, 1),
                   x[:1].expand(3, -1, -1)):  # fmt: skip
        checks.assert_equals_oracle(
            op, oracle_of(weight, bias, index), [turned, *factors], torch.float32
        )


@pytest.mark.parametrize("form", FUSED)
def test_same_bits_twice(form):
    sizes = {"d_in": 64, "d_out": 48}
    checks.assert_same_bits_twice(
        tiled(*frozen(**sizes), [0, 1, 0, -1], tiles=of_form(form)),
        [t.float() for t in inputs(e=4, t=33, r=16, **sizes)],
    )


def test_wide_adapters_over_half_precision():
    x, lora_a, lora_b = inputs()
    args = frozen()[0].half(), None, lora_a.float(), lora_b.float(), torch.tensor([0, 1, 0]), SCALE
    (y, u), *others = (
        kernels.lora_linear(x.half(), *args, None, None, True, of_form(form))
        for form in kernels.FORMS
    )
    assert y.dtype == u.dtype == torch.float16
    for other in others:
        for found, expected in zip(other, (y, u), strict=True):
            torch.testing.assert_close(found, expected, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("form", kernels.FORMS)
def test_the_table_chooses_the_form(form, monkeypatch):
    launched, launches = [], {}
    for module, name in ((kernels, "expand_"), (lora_gemm, "epilogue"), (lora_gemm, "recompute")):

        def record(*args, name=name, module=module):
            launched.append(name.rstrip("_"))
            return launches[name](*args)

        launches[name] = getattr(module, name)
        monkeypatch.setattr(module, name, record)
    shipped = device.table("lora_linear")["default"]
    entries = [
        {**entry, "config": {"form": form}} if "form" in entry["config"] else entry
        for entry in shipped
    ]
    monkeypatch.setattr(device, "table", lambda name: {"default": entries})
    device._nearest.cache_clear()
    x, lora_a, lora_b = (t.float().requires_grad_() for t in inputs())
    weight, bias = (t.float() for t in frozen())
    lora_linear(x, weight, bias, lora_a, lora_b, torch.tensor([0, 1, 0]), SCALE).sum().backward()
    device._nearest.cache_clear()
    assert launched == [form, form]


def test_a_rank_beyond_a_tile_takes_the_epilogue():
    where = torch.tensor([0, 1, 0]), SCALE, None, None
    x, lora_a, lora_b = (t.float() for t in inputs(r=48))
    weight, _ = (t.float() for t in frozen())
    rows = x.flatten(0, 1)
    tiles = of_form("recompute")
    assert lora_gemm.recompute(rows, weight, None, lora_a, lora_b, *where, False, tiles) is None
    args = x, weight, None, lora_a, lora_b, *where, True
    found, expected = (
        kernels.lora_linear(*args, of_form(form)) for form in ("recompute", "epilogue")
    )
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
