"""rank_projection against normalization, einsum and concatenation of torch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from csrc_triton import rank_projection
from tests.csrc_triton import checks
from tests.csrc_triton.checks import random


def inputs(g=2, c=2, layers=3, r=4, z=5, d_in=7, d_out=6, unused=0, bias=0) -> list[torch.Tensor]:
    tensors = [
        random(g, c, layers, r, z, seed=0),
        random(layers, z, d_in + d_out + unused, seed=1) / z**0.5,
        random(layers, r, seed=2),
        random(layers, r, seed=3),
    ]
    if bias:
        tensors += [random(layers, bias, d_in, seed=4), random(layers, bias, d_out, seed=5)]
    return tensors


def op_of(d_in=7, d_out=6):
    return lambda *tensors: rank_projection(*tensors, d_in=d_in, d_out=d_out)


def oracle_of(d_in=7, d_out=6):
    def oracle(latents, weight, scaler_a, scaler_b, bias_a=None, bias_b=None):
        unit = F.normalize(latents, dim=-1, eps=0.0)
        columns = unit @ weight[:, :, : d_in + d_out]
        factors = []
        for part, scaler, bias in (
            (columns[..., :d_in], scaler_a, bias_a),
            (columns[..., d_in:], scaler_b, bias_b),
        ):
            chunks = (part * scaler[..., None]).unbind(1)
            shared = [] if bias is None else [bias.expand(len(latents), -1, -1, -1)]
            factors.append(torch.cat([*chunks, *shared], 2))
        return tuple(factors)

    return oracle


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"bias": 4},
        {"bias": 2, "unused": 3},
        {"g": 1, "c": 1, "layers": 1, "r": 1, "z": 3},
        {"c": 3, "r": 48, "z": 33, "bias": 48},
    ],
)
def test_equals_oracle(sizes, dtype):
    checks.assert_equals_oracle(op_of(), oracle_of(), inputs(**sizes), dtype)


def test_odd_widths():
    sizes = {"d_in": 2049, "d_out": 31}
    checks.assert_equals_oracle(
        op_of(**sizes), oracle_of(**sizes), inputs(z=32, **sizes), torch.float32
    )


@pytest.mark.parametrize("size", [0.0, 1e-15, 1e15])
def test_length_of_a_latent_does_not_matter(size):
    tensors = [t.float() for t in inputs()]
    a, b = op_of()(*tensors)
    tensors[0][0] *= size
    found_a, found_b = op_of()(*tensors)
    if size == 0:
        assert not found_a[0].any() and not found_b[0].any()
    else:
        torch.testing.assert_close(found_a[0], a[0])
        torch.testing.assert_close(found_b[0], b[0])
    assert torch.equal(found_a[1], a[1])


def test_zero_latent_has_zero_gradient():
    tensors = inputs()
    tensors[0][0, 0] = 0
    found = checks.values_and_gradients(op_of(), tensors)
    assert all(torch.isfinite(t).all() for t in found)
    assert not found[2][0, 0].any()


def test_unused_columns_get_no_gradient():
    grads = checks.values_and_gradients(op_of(), inputs(unused=3))[2:]
    assert not grads[1][..., -3:].any() and grads[1][..., :-3].any()


def test_gradcheck():
    checks.assert_gradcheck(op_of(), inputs(bias=2))


@pytest.mark.parametrize("bias", [0, 2])
def test_layouts_do_not_matter(bias):
    checks.assert_layouts_do_not_matter(op_of(), inputs(bias=bias))


def test_same_bits_twice():
    checks.assert_same_bits_twice(op_of(), [t.float() for t in inputs(r=16, z=64, bias=16)])


def test_bias_keeps_its_dtype():
    *tensors, bias_a, bias_b = inputs(bias=2)
    tensors = [t.bfloat16() for t in tensors]
    found = checks.values_and_gradients(op_of(), [*tensors, bias_a.float(), bias_b.float()])
    assert found[0].dtype == torch.bfloat16
    assert found[-1].dtype == found[-2].dtype == torch.float32


@pytest.mark.parametrize("bias", [0, 2])
def test_opcheck(bias):
    tensors = [t.float().requires_grad_() for t in inputs(bias=bias)]
    tensors += [None] * (6 - len(tensors))
    torch.library.opcheck(torch.ops.v2l.rank_projection.default, (*tensors, 7, 6))
    grads = [random(2, 3, 8 + bias, d).float() for d in (7, 6)]
    checks.opcheck_backward(
        torch.ops.v2l.rank_projection_backward.default, (*grads, *tensors[:4], 7, 6)
    )


def test_compiles():
    few, many = ([t.float() for t in inputs(g=g, bias=2)] for g in (9, 11))
    checks.assert_compiles(op_of(), few, many, "aot_eager")
