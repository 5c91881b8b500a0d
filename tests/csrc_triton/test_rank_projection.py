"""rank_projection against a normalization and matrix products in PyTorch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from csrc_triton import device as configs
from csrc_triton import rank_projection
from csrc_triton.rank_projection.op import _check
from tests.csrc_triton import checks
from tests.csrc_triton.checks import random

SMALL_TILE = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}


def inputs(n=4, r=4, z=5, d_in=7, d_out=6, unused=0) -> list[torch.Tensor]:
    return [
        random(n, r, z, seed=0),
        random(z, d_in + d_out + unused, seed=1) / z**0.5,
        random(r, seed=2),
        random(r, seed=3),
    ]


def op_of(d_in=7, d_out=6):
    return lambda *tensors: rank_projection(*tensors, d_in=d_in, d_out=d_out)


def oracle_of(d_in=7, d_out=6):
    def oracle(latents, weight, scaler_a, scaler_b):
        columns = F.normalize(latents, dim=-1, eps=0.0) @ weight
        return (
            columns[..., :d_in] * scaler_a[:, None],
            columns[..., d_in : d_in + d_out] * scaler_b[:, None],
        )

    return oracle


def assert_equals_oracle(tensors, dtype, device, d_in=7, d_out=6) -> None:
    sizes = d_in, d_out
    checks.assert_equals_oracle(op_of(*sizes), oracle_of(*sizes), tensors, dtype, device)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"unused": 3},
        {"n": 1, "r": 1, "z": 3},
        {"n": 3, "r": 48, "z": 33},
        {"n": 3, "r": 32, "z": 31},
    ],
)
def test_equals_oracle(sizes, device, dtype):
    assert_equals_oracle(inputs(**sizes), dtype, device)


def test_many_tiles_of_everything(kernel_device, dtype, monkeypatch):
    monkeypatch.setattr(configs, "lookup", lambda op, capability, **shape: dict(SMALL_TILE))
    sizes = {"d_in": 37, "d_out": 70}
    tensors = inputs(n=6, r=7, z=45, unused=5, **sizes)
    assert_equals_oracle(tensors, dtype, kernel_device, **sizes)


def test_odd_widths(device):
    sizes = {"d_in": 2049, "d_out": 31}
    assert_equals_oracle(inputs(z=32, **sizes), torch.float32, device, **sizes)


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


def test_no_rows(device):
    a, b = op_of()(*(t.float().to(device) for t in inputs(n=0)))
    assert a.shape == (0, 4, 7) and b.shape == (0, 4, 6)


@pytest.mark.parametrize("narrow", [0, 1, 2])
def test_latents_weight_and_scaler_of_several_dtypes(narrow, device):
    tensors = [t.float().to(device) for t in inputs(z=33)]
    tensors[narrow] = tensors[narrow].half()
    results = checks.values_and_gradients(op_of(), tensors)
    exact = checks.values_and_gradients(oracle_of(), [t.double() for t in tensors])
    assert [t.dtype for t in results] == [tensors[0].dtype] * 2 + [t.dtype for t in tensors]
    for r, e in zip(results, exact, strict=True):
        eps = 4 * torch.finfo(r.dtype).eps if r.dtype == torch.float16 else 1e-5
        # The cotangent of a half-precision output is itself rounded to half precision.
        eps = max(eps, 2e-3 if narrow == 0 else 0)
        assert (r - e).abs().max() <= eps * e.abs().max()


def test_layouts_do_not_matter(device):
    checks.assert_layouts_do_not_matter(op_of(), inputs(), device)


def test_expanded_tensors(device):
    latents, weight, scaler_a, scaler_b = inputs()
    shared = latents[:1].expand(2, -1, -1)
    half = torch.full((), 0.5).expand(scaler_a.shape)
    assert_equals_oracle([shared, weight, half, scaler_b], torch.float32, device)


def test_same_bits_twice(device):
    tensors = [t.float().to(device) for t in inputs(r=16, z=64)]
    checks.assert_same_bits_twice(op_of(), tensors)


def test_opcheck(device):
    tensors = [t.float().to(device).requires_grad_() for t in inputs(unused=3)]
    torch.library.opcheck(torch.ops.v2l.rank_projection.default, (*tensors, 7, 6))
    grads = [random(4, 4, d).float().to(device) for d in (7, 6)]
    checks.opcheck_backward(torch.ops.v2l.rank_projection_backward.default, (*grads, *tensors))


def test_gradcheck():
    checks.assert_gradcheck(op_of(), inputs())


def test_compiles():
    few, many = ([t.float() for t in inputs(n=n)] for n in (9, 11))
    checks.assert_compiles(op_of(), few, many, "aot_eager")


# --- arguments -------------------------------------------------------------------------------

NAMES = "latents", "weight", "scaler_a", "scaler_b"


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("latents", torch.zeros(4, 5), r"latents must be \[N, R, Z\], got \[4, 5\]"),
        ("latents", torch.zeros(4, 4, 5).long(), "latents must be floating point"),
        ("weight", torch.zeros(5, 12), r"weight must be \[5, 13 or more\], got \[5, 12\]"),
        ("scaler_a", torch.zeros(5), r"scaler_a must be \[4\], got \[5\]"),
        ("scaler_b", torch.zeros(4).long(), "scaler_b must be floating point, got torch.int64"),
    ],
)
def test_error_names_the_argument(name, wrong, message):
    args = dict(zip(NAMES, (t.float() for t in inputs()), strict=True))
    with pytest.raises(ValueError, match=f"rank_projection: {message}"):
        rank_projection(**{**args, name: wrong}, d_in=7, d_out=6)


@pytest.mark.parametrize("name", NAMES[1:])
def test_every_tensor_on_one_device(name):
    args = dict(zip(NAMES, inputs(), strict=True))
    with pytest.raises(ValueError, match=f"rank_projection: {name} must be on cpu, got meta"):
        _check(**{**args, name: args[name].to("meta")}, d_in=7, d_out=6)


def test_the_deprecated_form_with_all_layers_is_each_layer_by_itself():
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    latents, weight = random(2, 3, 2, 4, 16), random(2, 16, 12)
    scalers, biases = (random(2, 4), random(2, 4)), (random(2, 5, 8), random(2, 5, 4))
    with pytest.warns(DeprecationWarning, match="takes one layer"):
        a, b = rank_projection(latents, weight, *scalers, *biases, d_in=8, d_out=4)
    assert a.shape == (2, 2, 17, 8) and b.shape == (2, 2, 17, 4)
    for group, chunk, layer in itertools.product(range(2), range(3), range(2)):
        expected = rank_projection(
            latents[group, chunk, layer][None], weight[layer], scalers[0][layer],
            scalers[1][layer], d_in=8, d_out=4,
        )  # fmt: skip
        own = slice(4 * chunk, 4 * chunk + 4)
        torch.testing.assert_close(a[group, layer, own], expected[0][0])
        torch.testing.assert_close(b[group, layer, own], expected[1][0])
        assert torch.equal(a[group, layer, 12:], biases[0][layer])
