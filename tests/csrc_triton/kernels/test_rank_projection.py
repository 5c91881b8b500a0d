"""The kernel of rank_projection in Triton's interpreter, against the oracle of the op's tests."""

from __future__ import annotations

import pytest
import torch

from csrc_triton import rank_projection
from csrc_triton.rank_projection import kernels, reference
from csrc_triton.rank_projection.op import _check
from tests.csrc_triton import checks
from tests.csrc_triton.checks import random
from tests.csrc_triton.test_rank_projection import inputs, op_of, oracle_of

DTYPES = [torch.float32, torch.float16]
TILE = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}


@pytest.fixture(autouse=True)
def kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V2L_BACKEND", "triton")
    for name in ("rank_projection", "rank_projection_backward"):
        monkeypatch.delattr(reference, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"bias": 4},
        {"bias": 2, "unused": 3},
        {"g": 1, "c": 1, "layers": 1, "r": 1, "z": 3},
        {"g": 1, "c": 1, "layers": 1, "r": 8, "z": 17},
        {"g": 1, "c": 2, "layers": 1, "r": 16, "z": 64, "bias": 16},
        {"c": 3, "r": 48, "z": 33, "bias": 48},
        {"g": 3, "c": 1, "r": 32, "z": 31, "bias": 1},
    ],
)
def test_equals_oracle(sizes, dtype):
    checks.assert_equals_oracle(op_of(), oracle_of(), inputs(**sizes), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tiles_of_everything(dtype):
    sizes = {"d_in": 37, "d_out": 70}
    tensors = [t.to(dtype) for t in inputs(g=3, c=2, r=7, z=45, bias=9, unused=5, **sizes)]
    found = kernels.rank_projection(*tensors, **sizes, config=TILE)
    exact = oracle_of(**sizes)(*(t.double() for t in tensors))
    same_dtype = oracle_of(**sizes)(*tensors)
    for f, e, s in zip(found, exact, same_dtype, strict=True):
        assert (f - e).abs().max() <= 2 * (s - e).abs().max()


def test_odd_widths():
    sizes = {"d_in": 2049, "d_out": 31}
    checks.assert_equals_oracle(
        op_of(**sizes), oracle_of(**sizes), inputs(z=32, bias=2, **sizes), torch.float32
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
    tensors = [t.float() for t in inputs()]
    tensors[0][0, 0] = 0
    found = checks.values_and_gradients(op_of(), tensors)
    assert all(torch.isfinite(t).all() for t in found)
    assert not found[2][0, 0].any()


def test_neighbors_of_a_head_are_not_read():
    """Columns of A end where those of B begin, and unused ones lie behind both."""
    latents, weight, scaler_a, scaler_b = (t.float() for t in inputs(unused=3))
    a, b = op_of()(latents, weight, scaler_a, scaler_b)
    half = weight.clone()
    half[..., 7:] = torch.nan
    assert torch.equal(op_of()(latents, half, scaler_a, scaler_b)[0], a)
    half = weight.clone()
    half[..., :7], half[..., 13:] = torch.nan, torch.nan
    assert torch.equal(op_of()(latents, half, scaler_a, scaler_b)[1], b)


def test_unused_columns_get_no_gradient():
    grads = checks.values_and_gradients(op_of(), [t.float() for t in inputs(unused=3)])[2:]
    assert not grads[1][..., -3:].any() and grads[1][..., :-3].any()


@pytest.mark.parametrize("narrow", [0, 1])
def test_latents_and_weight_of_two_dtypes(narrow):
    tensors = [t.float() for t in inputs(z=33, bias=2)]
    tensors[narrow] = tensors[narrow].half()
    found = checks.values_and_gradients(op_of(), tensors)
    exact = checks.values_and_gradients(oracle_of(), [t.double() for t in tensors])
    expected = [tensors[0].dtype] * 2 + [t.dtype for t in tensors]
    assert [t.dtype for t in found] == expected
    for f, e in zip(found, exact, strict=True):
        eps = 4 * torch.finfo(f.dtype).eps if f.dtype == torch.float16 else 1e-5
        # The cotangent of a half-precision output is itself rounded to half precision.
        eps = max(eps, 2e-3 if narrow == 0 else 0)
        assert (f - e).abs().max() <= eps * e.abs().max()


@pytest.mark.parametrize("bias", [0, 2])
def test_layouts_do_not_matter(bias):
    turned = [t.float().mT.contiguous().mT for t in inputs(bias=bias)]
    assert not any(t.is_contiguous() for t in turned)
    assert all(t.is_contiguous() for t in op_of()(*turned))
    checks.assert_equals_oracle(op_of(), oracle_of(), turned, torch.float32)


def test_expanded_tensors():
    latents, weight, scaler_a, scaler_b = (t.float() for t in inputs())
    shared = latents[:1].expand(2, -1, -1, -1, -1)
    one = torch.full((), 0.5).expand(scaler_a.shape)
    checks.assert_equals_oracle(
        op_of(), oracle_of(), [shared, weight, one, scaler_b], torch.float32
    )
    ones = [torch.ones(()).expand(2, 3, 8, d) for d in (7, 6)]
    for f, e in zip(
        kernels.rank_projection_backward(*ones, latents, weight, scaler_a, scaler_b, 7, 6),
        kernels.rank_projection_backward(
            *(o.contiguous() for o in ones), latents, weight, scaler_a, scaler_b, 7, 6
        ),
        strict=True,
    ):
        assert f.is_contiguous()
        torch.testing.assert_close(f, e)


def test_same_bits_twice():
    checks.assert_same_bits_twice(op_of(), [t.float() for t in inputs(r=16, z=64, bias=16)])


def test_no_groups():
    a, b = rank_projection(*(t.float() for t in inputs(g=0)), d_in=7, d_out=6)
    assert a.shape == (0, 3, 8, 7) and b.shape == (0, 3, 8, 6)


def test_bias_fills_its_slots_bit_for_bit():
    tensors = [t.float() for t in inputs(bias=5)]
    for factor, bias in zip(op_of()(*tensors), tensors[4:], strict=True):
        assert torch.equal(factor[:, :, 8:], bias.expand(2, -1, -1, -1))


@pytest.mark.parametrize("bias", [0, 2])
def test_opcheck(bias):
    tensors = [t.float() for t in inputs(bias=bias)]
    padded = (*tensors, *[None] * (6 - len(tensors)))
    checks.opcheck_backward(torch.ops.v2l.rank_projection.default, (*padded, 7, 6))
    grads = [random(2, 3, 8 + bias, d).float() for d in (7, 6)]
    checks.opcheck_backward(
        torch.ops.v2l.rank_projection_backward.default, (*grads, *tensors[:4], 7, 6)
    )


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, torch.zeros(2, 3, 4, 5), r"latents must be \[G, C, L, R, Z\], not \[2, 3, 4, 5\]"),
        (1, torch.zeros(3, 5, 12), r"weight must be \[3, 5, 13 or more\], not \[3, 5, 12\]"),
        (2, torch.zeros(3, 5), r"scaler_a must be \[3, 4\], not \[3, 5\]"),
        (5, torch.zeros(3, 3, 6), r"bias_b must be \[3, 2, 6\], not \[3, 3, 6\]"),
        (5, None, "bias_b must be given with bias_a"),
        (0, torch.zeros(2, 2, 3, 4, 5).long(), "latents must be floating point, not torch.int64"),
        (3, torch.zeros(3, 4).long(), "scaler_b must be floating point, not torch.int64"),
    ],
)
def test_bad_input_names_the_argument(place, wrong, message):
    tensors = [t.float() for t in inputs(bias=2)]
    tensors[place] = wrong
    with pytest.raises(ValueError, match=f"rank_projection: {message}"):
        op_of()(*tensors)


def test_every_tensor_on_one_device():
    names = "latents", "weight", "scaler_a", "scaler_b", "bias_a", "bias_b"
    given = dict(zip(names, inputs(bias=2), strict=True))
    for name in names[1:]:
        with pytest.raises(ValueError, match=f"rank_projection: {name} must be on cpu, not meta"):
            _check(**{**given, name: given[name].to("meta")}, d_in=7, d_out=6)
