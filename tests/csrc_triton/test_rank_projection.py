"""rank_projection against normalization, einsum and concatenation in PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from csrc_triton import device as configs
from csrc_triton import rank_projection
from csrc_triton.rank_projection.op import _check
from tests.csrc_triton import checks
from tests.csrc_triton.checks import random

SMALL_TILE = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}


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


def assert_equals_oracle(tensors, dtype, device, d_in=7, d_out=6) -> None:
    sizes = d_in, d_out
    checks.assert_equals_oracle(op_of(*sizes), oracle_of(*sizes), tensors, dtype, device)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"bias": 2, "unused": 3},
        {"g": 1, "c": 1, "layers": 1, "r": 1, "z": 3},
        {"c": 3, "r": 48, "z": 33, "bias": 48},
        {"g": 3, "c": 1, "r": 32, "z": 31, "bias": 1},
    ],
)
def test_equals_oracle(sizes, device, dtype):
    assert_equals_oracle(inputs(**sizes), dtype, device)


def test_many_tiles_of_everything(kernel_device, dtype, monkeypatch):
    monkeypatch.setattr(configs, "lookup", lambda op, capability, **shape: dict(SMALL_TILE))
    sizes = {"d_in": 37, "d_out": 70}
    tensors = inputs(g=3, c=2, r=7, z=45, bias=9, unused=5, **sizes)
    assert_equals_oracle(tensors, dtype, kernel_device, **sizes)


def test_odd_widths(device):
    sizes = {"d_in": 2049, "d_out": 31}
    assert_equals_oracle(inputs(z=32, bias=2, **sizes), torch.float32, device, **sizes)


@pytest.mark.parametrize("size", [0.0, 1e-15, 1e15])
def test_length_of_a_latent_does_not_matter(size, device):
    tensors = [t.float().to(device) for t in inputs()]
    a, b = op_of()(*tensors)
    tensors[0][0] *= size
    scaled_a, scaled_b = op_of()(*tensors)
    if size == 0:
        assert not scaled_a[0].any() and not scaled_b[0].any()
    else:
        torch.testing.assert_close(scaled_a[0], a[0])
        torch.testing.assert_close(scaled_b[0], b[0])
    assert torch.equal(scaled_a[1], a[1])


def test_zero_latent_has_zero_gradient(device):
    tensors = [t.float().to(device) for t in inputs()]
    tensors[0][0, 0] = 0
    results = checks.values_and_gradients(op_of(), tensors)
    assert all(torch.isfinite(t).all() for t in results)
    assert not results[2][0, 0].any()


def test_neighbors_of_a_head_are_not_read(kernel_device):
    """The columns of A end where those of B begin, and unused ones follow both."""
    latents, weight, *scalers = (t.float().to(kernel_device) for t in inputs(unused=3))
    a, b = op_of()(latents, weight, *scalers)
    only_a, only_b = weight.clone(), weight.clone()
    only_a[..., 7:] = only_b[..., :7] = only_b[..., 13:] = torch.nan
    assert torch.equal(op_of()(latents, only_a, *scalers)[0], a)
    assert torch.equal(op_of()(latents, only_b, *scalers)[1], b)


def test_unused_columns_get_no_gradient(device):
    tensors = [t.float().to(device) for t in inputs(unused=3)]
    d_weight = checks.values_and_gradients(op_of(), tensors)[3]
    assert not d_weight[..., -3:].any() and d_weight[..., :-3].any()


def test_no_groups(device):
    a, b = op_of()(*(t.float().to(device) for t in inputs(g=0)))
    assert a.shape == (0, 3, 8, 7) and b.shape == (0, 3, 8, 6)


def test_bias_fills_its_slots_bit_for_bit(device):
    tensors = [t.float().to(device) for t in inputs(bias=5)]
    for factor, bias in zip(op_of()(*tensors), tensors[4:], strict=True):
        assert torch.equal(factor[:, :, 8:], bias.expand(2, -1, -1, -1))


@pytest.mark.parametrize("narrow", [0, 1, 4])
def test_latents_weight_and_bias_of_several_dtypes(narrow, device):
    tensors = [t.float().to(device) for t in inputs(z=33, bias=2)]
    tensors[narrow] = tensors[narrow].half()
    results = checks.values_and_gradients(op_of(), tensors)
    exact = checks.values_and_gradients(oracle_of(), [t.double() for t in tensors])
    assert [t.dtype for t in results] == [tensors[0].dtype] * 2 + [t.dtype for t in tensors]
    for r, e in zip(results, exact, strict=True):
        eps = 4 * torch.finfo(r.dtype).eps if r.dtype == torch.float16 else 1e-5
        # The cotangent of a half-precision output is itself rounded to half precision.
        eps = max(eps, 2e-3 if narrow == 0 else 0)
        assert (r - e).abs().max() <= eps * e.abs().max()


@pytest.mark.parametrize("bias", [0, 2])
def test_layouts_do_not_matter(bias, device):
    checks.assert_layouts_do_not_matter(op_of(), inputs(bias=bias), device)


def test_expanded_tensors(device):
    latents, weight, scaler_a, scaler_b = inputs()
    shared = latents[:1].expand(2, -1, -1, -1, -1)
    half = torch.full((), 0.5).expand(scaler_a.shape)
    assert_equals_oracle([shared, weight, half, scaler_b], torch.float32, device)


def test_same_bits_twice(device):
    tensors = [t.float().to(device) for t in inputs(r=16, z=64, bias=16)]
    checks.assert_same_bits_twice(op_of(), tensors)


@pytest.mark.parametrize("bias", [0, 2])
def test_opcheck(bias, device):
    tensors = [t.float().to(device).requires_grad_() for t in inputs(bias=bias)]
    padded = (*tensors, *[None] * (6 - len(tensors)))
    torch.library.opcheck(torch.ops.v2l.rank_projection.default, (*padded, 7, 6))
    grads = [random(2, 3, 8 + bias, d).float().to(device) for d in (7, 6)]
    checks.opcheck_backward(
        torch.ops.v2l.rank_projection_backward.default, (*grads, *tensors[:4], 7, 6)
    )


def test_gradcheck():
    checks.assert_gradcheck(op_of(), inputs(bias=2))


def test_compiles():
    few, many = ([t.float() for t in inputs(g=g, bias=2)] for g in (9, 11))
    checks.assert_compiles(op_of(), few, many, "aot_eager")


# --- arguments -------------------------------------------------------------------------------

NAMES = "latents", "weight", "scaler_a", "scaler_b", "bias_a", "bias_b"


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        (
            "latents",
            torch.zeros(2, 3, 4, 5),
            r"latents must be \[G, C, L, R, Z\], got",
        ),
        ("latents", torch.zeros(2, 2, 3, 4, 5).long(), "latents must be floating point"),
        ("weight", torch.zeros(3, 5, 12), r"weight must be \[3, 5, 13 or more\], got \[3, 5, 12\]"),
        ("scaler_a", torch.zeros(3, 5), r"scaler_a must be \[3, 4\], got \[3, 5\]"),
        ("scaler_b", torch.zeros(3, 4).long(), "scaler_b must be floating point, got torch.int64"),
        ("bias_b", torch.zeros(3, 3, 6), r"bias_b must be \[3, 2, 6\], got \[3, 3, 6\]"),
        ("bias_b", None, "bias_b must be passed if and only if bias_a is"),
    ],
)
def test_error_names_the_argument(name, wrong, message):
    args = dict(zip(NAMES, (t.float() for t in inputs(bias=2)), strict=True))
    with pytest.raises(ValueError, match=f"rank_projection: {message}"):
        rank_projection(**{**args, name: wrong}, d_in=7, d_out=6)


@pytest.mark.parametrize("name", NAMES[1:])
def test_every_tensor_on_one_device(name):
    args = dict(zip(NAMES, inputs(bias=2), strict=True))
    with pytest.raises(ValueError, match=f"rank_projection: {name} must be on cpu, got meta"):
        _check(**{**args, name: args[name].to("meta")}, d_in=7, d_out=6)
