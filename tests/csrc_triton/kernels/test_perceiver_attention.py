"""The kernels of perceiver_attention in Triton's interpreter, against the op's own oracle."""

from __future__ import annotations

import pytest
import torch

from csrc_triton import device, perceiver_attention
from csrc_triton.perceiver_attention import kernels, reference
from tests.csrc_triton import checks
from tests.csrc_triton.checks import random
from tests.csrc_triton.test_perceiver_attention import finite_lse, finite_oracle, inputs

DTYPES = [torch.float32, torch.float16]
VARIANTS = [
    variant.value
    for variant in (
        kernels.PLAIN, kernels.REGION, kernels.TRANSPOSED_SOFTMAX, kernels.TRANSPOSED
    )
]  # fmt: skip
WARPS = {"num_warps": 4, "num_stages": 2}
# Small tiles make small shapes take several of each.
GRADIENT_TILES = {"BLOCK_P": 16, "BLOCK_S": 16, "BLOCK_K": 16, **WARPS}


def shipped(kernel: str) -> list[dict[str, int]]:
    """The distinct configurations of a kernel, whatever the architecture."""
    found = {
        tuple(entry["config"].items()): entry["config"]
        for section in device.table("perceiver_attention").values()
        for entry in section
        if entry["where"]["kernel"] == kernel
    }
    return list(found.values())


def tiles(variant: int) -> dict[str, int]:
    return {"BLOCK_P": 16, "BLOCK_S": 16, "VAR": variant, **WARPS}


@pytest.fixture(autouse=True)
def kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V2L_BACKEND", "triton")
    for name in ("perceiver_attention", "perceiver_attention_backward"):
        monkeypatch.delattr(reference, name)


def tiled(config=None, n_splits=1, gradient_config=None):
    """The launches with given tiles as a differentiable function, log-sum-exp made finite."""

    class Tiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, context, inv_rms):
            out, lse = kernels.perceiver_attention(
                query, context, inv_rms, config=config or tiles(0), n_splits=n_splits
            )
            ctx.save_for_backward(query, context, inv_rms, out, lse)
            return out, lse

        @staticmethod
        def backward(ctx, grad_out, grad_lse):
            return kernels.perceiver_attention_backward(
                grad_out, grad_lse, *ctx.saved_tensors, config=gradient_config or GRADIENT_TILES
            )

    def function(query, context, inv_rms):
        out, lse = Tiled.apply(query, context, inv_rms)
        return out, lse.exp()

    return function


def assert_equals_oracle(function, args, dtype) -> None:
    checks.assert_equals_oracle(function, finite_oracle, args, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("s", [1, 7, 31, 32, 33, 300])
def test_lengths(s, variant, dtype):
    assert_equals_oracle(tiled(tiles(variant)), inputs(2, 5, s, 16), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_long_ragged_batch(variant, dtype):
    args = inputs(3, 5, 1023, 16, lengths=[1023, 0, 700])
    wide = {**tiles(variant), "BLOCK_S": 128}
    gradient = {**GRADIENT_TILES, "BLOCK_S": 128}
    assert_equals_oracle(tiled(wide, 2, gradient), args, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("p", "z"), [(1, 1), (17, 48), (40, 100), (3, 257)])
def test_widths(p, z, variant, dtype):
    assert_equals_oracle(tiled(tiles(variant), 2), inputs(2, p, 37, z), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n_splits", [1, 3, 8])
def test_ragged_batch_with_empty_rows(n_splits, variant, dtype):
    args = inputs(4, 5, 83, 32, lengths=[0, 1, 83, 50])
    assert_equals_oracle(tiled(tiles(variant), n_splits), args, dtype)
    out, lse = kernels.perceiver_attention(
        *(t.to(dtype) for t in args), config=tiles(variant), n_splits=n_splits
    )
    assert not out[0].any() and (lse[0] == -torch.inf).all() and torch.isfinite(lse[1:]).all()


@pytest.mark.parametrize("config", shipped("attend"))
def test_shipped_tiles(config):
    assert_equals_oracle(tiled(config, 2), inputs(2, 70, 100, 40, lengths=[100, 9]), torch.float16)


@pytest.mark.parametrize("config", shipped("score_gradients"))
def test_shipped_gradient_tiles(config):
    args = inputs(2, 140, 70, 72, lengths=[70, 9])
    assert_equals_oracle(tiled(gradient_config=config), args, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_op_launches_the_kernels(dtype):
    assert_equals_oracle(finite_lse, inputs(2, 20, 45, 24, lengths=[45, 30]), dtype)
    with pytest.raises(RuntimeError, match="float64"):
        perceiver_attention(*inputs(2, 3, 5, 4))


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_masked_context_may_hold_any_finite_value(variant, dtype):
    query, context, inv_rms = (t.to(dtype) for t in inputs(3, 5, 50, 16))
    s = torch.arange(50)
    visible = torch.stack([s % 3 > 0, (s > 20) & (s < 40), s < 10])
    inv_rms = inv_rms * visible
    largest = torch.finfo(dtype).max
    dirty = torch.where(visible[..., None], context, largest * (-1.0) ** s[:, None]).to(dtype)
    function = tiled(tiles(variant), 2)
    clean = torch.where(visible[..., None], context, 0.0)
    found = checks.values_and_gradients(function, [query, dirty, inv_rms])
    expected = checks.values_and_gradients(function, [query, clean, inv_rms])
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e)
    assert not found[3][~visible].any() and not found[4][~visible].any()
    # Visible ranges that start late, and whose shares are smaller than the whole context's.
    assert_equals_oracle(function, [query, clean, inv_rms], dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_large_scores_do_not_overflow(variant):
    query, context, inv_rms = (t.float() for t in inputs(1, 2, 40, 4))
    args = query * 1e4, context, inv_rms
    out, lse = kernels.perceiver_attention(*args, config=tiles(variant), n_splits=2)
    scores = args[0] @ context.mT * inv_rms[:, None]
    torch.testing.assert_close(lse, torch.logsumexp(scores, -1))
    torch.testing.assert_close(out, torch.softmax(scores, -1) @ (context * inv_rms[..., None]))


def test_context_that_is_not_finite_shows():
    query, context, inv_rms = (t.float() for t in inputs(2, 3, 20, 4))
    context[0, 7, 2] = torch.nan
    out, _ = kernels.perceiver_attention(query, context, inv_rms)
    assert out[0].isnan().all() and torch.isfinite(out[1]).all()


def test_nothing_to_attend_to():
    for n, p, s in ((2, 3, 0), (0, 3, 5), (2, 0, 5)):
        args = [t.float() for t in inputs(n, p, s, 4)]
        out, lse = kernels.perceiver_attention(*args)
        assert out.shape == (n, p, 4) and not out.any() and (lse == -torch.inf).all()
        grads = kernels.perceiver_attention_backward(out, lse.exp(), *args, out, lse)
        assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, args, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_layouts_do_not_matter(variant):
    args = [t.float() for t in inputs(2, 3, 37, 16)]
    function = tiled(tiles(variant), 2)
    checks.assert_layouts_do_not_matter(function, args)
    query, context, inv_rms = args
    # One query for every slice, every other token, tokens that are not next to each other.
    views = query[:1].expand(2, -1, -1), context[:, ::2], inv_rms[:, ::2]
    turned = query[:1].expand(2, -1, -1), context.transpose(0, 1)[::2].transpose(0, 1), views[2]
    expected = checks.values_and_gradients(function, [t.contiguous() for t in views])
    for given in (views, turned):
        out = kernels.perceiver_attention(*given, config=tiles(variant), n_splits=2)
        assert torch.equal(out[0], expected[0]) and torch.equal(out[1].exp(), expected[1])
        cotangents = [random(*r.shape, seed=97 + i).to(r) for i, r in enumerate(expected[:2])]
        grads = kernels.perceiver_attention_backward(
            cotangents[0], cotangents[1] * expected[1], *given, *out, config=GRADIENT_TILES
        )
        for f, e in zip(grads, expected[2:], strict=True):
            assert torch.equal(f, e) and f.is_contiguous()


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_bits_twice(variant):
    args = [t.half() for t in inputs(2, 20, 100, 32, lengths=[100, 40])]
    checks.assert_same_bits_twice(tiled(tiles(variant), 3), args)


@pytest.mark.parametrize("n_splits", [2, 5, 30])
def test_splits_agree(n_splits):
    args = [t.float() for t in inputs(2, 5, 90, 16, lengths=[90, 33])]
    whole = checks.values_and_gradients(tiled(), args)
    parts = checks.values_and_gradients(tiled(n_splits=n_splits), args)
    for f, e in zip(parts, whole, strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize(
    ("programs", "processors", "token_tiles", "expected"),
    [
        (3072, 132, 13, 1),  # the slices alone fill the GPU
        (132, 132, 1024, 1),
        (64, 132, 1024, 2),  # 128 programs, one wave
        (64, 108, 2048, 5),  # 320 programs, 2.96 waves
        (64, 132, 4, 1),  # too few tokens to share
        (2, 132, 13, 3),
        (1, 1, 100, 1),
    ],
)
def test_split_count(programs, processors, token_tiles, expected):
    assert kernels.split_count(programs, processors, token_tiles) == expected


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at most 512, got 513; set V2L_BACKEND=reference"):
        perceiver_attention(*(t.float() for t in inputs(1, 2, 3, 513)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(3, 4)}, "query must be floating point"),
        ({"query": torch.zeros(2, 3, 4, dtype=torch.long)}, "query must be floating point"),
        ({"context": torch.zeros(2, 5, 3)}, r"context must be \[2, S, 4\] like query"),
        ({"context": torch.zeros(3, 5, 4)}, r"context must be \[2, S, 4\] like query"),
        ({"context": torch.zeros(2, 5, 4).half()}, "context must be torch.float32 like query"),
        ({"context": torch.zeros(2, 5, 4, device="meta")}, "context must be on cpu"),
        ({"inv_rms": torch.zeros(2, 4)}, r"inv_rms must be \(2, 5\) like context"),
        ({"inv_rms": torch.zeros(2, 5, dtype=torch.bool)}, "inv_rms must be floating point"),
        ({"inv_rms": torch.zeros(2, 5, device="meta")}, "inv_rms must be on cpu"),
    ],
)
def test_bad_arguments_are_named(change, message):
    good = {
        "query": torch.zeros(2, 3, 4),
        "context": torch.zeros(2, 5, 4),
        "inv_rms": torch.zeros(2, 5),
    }
    with pytest.raises(ValueError, match=message):
        perceiver_attention(**{**good, **change})


def test_opcheck():
    args = tuple(t.float().requires_grad_() for t in inputs(2, 3, 7, 4))
    torch.library.opcheck(torch.ops.v2l.perceiver_attention.default, args)
    out, lse = perceiver_attention(*args)
    checks.opcheck_backward(
        torch.ops.v2l.perceiver_attention_backward.default,
        (torch.ones_like(out), torch.ones_like(lse), *args, out, lse),
    )
