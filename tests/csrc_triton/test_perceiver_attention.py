"""perceiver_attention against a softmax over the normalized context, one row at a time."""

from __future__ import annotations

import shutil

import pytest
import torch

from csrc_triton import perceiver_attention
from tests.csrc_triton import checks
from tests.csrc_triton.checks import random

BACKENDS = ["aot_eager", *(["inductor"] if shutil.which("g++") else [])]


def oracle(query, context, inv_rms):
    normed = context * inv_rms[..., None]
    scores = query @ normed.mT
    scores = torch.where((inv_rms == 0)[:, None], float("-inf"), scores)
    empty = (inv_rms == 0).all(-1)[:, None, None]
    probs = torch.softmax(torch.where(empty, 0.0, scores), -1).masked_fill(empty, 0.0)
    lse = torch.logsumexp(torch.where(empty, 0.0, scores), -1)
    return probs @ normed, torch.where(empty[..., 0], float("-inf"), lse)


def inputs(n: int, p: int, s: int, z: int, lengths: list[int] | None = None) -> list[torch.Tensor]:
    inv_rms = random(n, s, seed=2).abs() + 0.5
    if lengths is not None:
        inv_rms = inv_rms * (torch.arange(s) < torch.tensor(lengths)[:, None])
    return [random(n, p, z, seed=0) / z**0.5, random(n, s, z, seed=1), inv_rms]


def finite_lse(query, context, inv_rms):
    """The op with a finite log-sum-exp, as everything that merges it must make it."""
    out, lse = perceiver_attention(query, context, inv_rms)
    return out, lse.exp()


def finite_oracle(query, context, inv_rms):
    out, lse = oracle(query, context, inv_rms)
    return out, lse.exp()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("s", [1, 7, 31, 32, 33, 300, 1023])
def test_equals_oracle(s, dtype):
    checks.assert_equals_oracle(finite_lse, finite_oracle, inputs(2, 5, s, 16), dtype)


@pytest.mark.parametrize(("p", "z"), [(1, 1), (128, 32), (3, 2049)])
def test_widths(p, z):
    checks.assert_equals_oracle(finite_lse, finite_oracle, inputs(2, p, 9, z), torch.float32)


def test_ragged_batch_with_empty_rows():
    args = inputs(4, 5, 33, 8, lengths=[0, 1, 33, 17])
    out, lse = perceiver_attention(*args)
    assert not out[0].any() and (lse[0] == -torch.inf).all()
    checks.assert_equals_oracle(finite_lse, finite_oracle, args, torch.float64)
    for row in (1, 2, 3):
        seen = args[2][row] != 0
        alone = perceiver_attention(
            args[0][row, None], args[1][row, None, seen], args[2][row, None, seen]
        )
        torch.testing.assert_close(out[row], alone[0][0])
        torch.testing.assert_close(lse[row], alone[1][0])


def test_no_tokens():
    out, lse = perceiver_attention(*inputs(2, 3, 0, 4))
    assert not out.any() and (lse == -torch.inf).all()


def test_holes_in_the_mask_reach_nothing():
    query, context, inv_rms = inputs(2, 3, 11, 4)
    inv_rms = inv_rms * (torch.arange(11) % 3 > 0)
    found = checks.values_and_gradients(finite_lse, [query, context, inv_rms])
    other = torch.where((inv_rms == 0)[..., None], 1e6, context)
    again = checks.values_and_gradients(finite_lse, [query, other, inv_rms])
    for a, b in zip(found, again, strict=True):
        torch.testing.assert_close(a, b)
    assert not found[3][inv_rms == 0].any() and not found[4][inv_rms == 0].any()


def test_parts_merge_by_log_sum_exp():
    query, context, inv_rms = inputs(2, 3, 20, 4, lengths=[20, 3])
    out, lse = perceiver_attention(query, context, inv_rms)
    parts = [
        perceiver_attention(query, context[:, p], inv_rms[:, p])
        for p in (slice(0, 8), slice(8, 20))
    ]
    merged_lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(o * (part_lse - merged_lse).exp()[..., None] for o, part_lse in parts)
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(merged_lse, lse)


def test_large_scores_do_not_overflow():
    query, context, inv_rms = inputs(1, 2, 5, 4)
    out, lse = perceiver_attention(query.float() * 1e4, context.float(), inv_rms.float())
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()


def test_gradcheck():
    checks.assert_gradcheck(perceiver_attention, inputs(2, 3, 4, 3))
    query, context, inv_rms = inputs(3, 2, 4, 3, lengths=[2, 0, 4])
    checks.assert_gradcheck(lambda q, c: finite_lse(q, c, inv_rms), [query, context])


def test_layouts_do_not_matter():
    checks.assert_layouts_do_not_matter(perceiver_attention, inputs(2, 3, 7, 4))


def test_query_shared_by_all_rows():
    query, context, inv_rms = inputs(3, 2, 5, 4)
    shared = query[:1].clone().requires_grad_()
    out, _ = perceiver_attention(shared.expand(3, -1, -1), context, inv_rms)
    out.square().sum().backward()
    copies = query[:1].repeat(3, 1, 1).requires_grad_()
    expected, _ = perceiver_attention(copies, context, inv_rms)
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(shared.grad, copies.grad.sum(0, keepdim=True))


def test_same_bits_twice():
    checks.assert_same_bits_twice(perceiver_attention, [t.float() for t in inputs(3, 8, 300, 16)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    args = tuple(t.to(dtype).requires_grad_() for t in inputs(2, 3, 7, 4))
    torch.library.opcheck(torch.ops.v2l.perceiver_attention.default, args)
    out, lse = perceiver_attention(*args)
    checks.opcheck_backward(
        torch.ops.v2l.perceiver_attention_backward.default,
        (torch.ones_like(out), torch.ones_like(lse), *args, out, lse),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles(backend):
    # Pointwise work around the op gives the compiler something to fuse.
    checks.assert_compiles(
        lambda q, c, r: perceiver_attention(q * 2, c.sin(), r)[0].cos(),
        *([t.float() for t in inputs(2, 3, s, 4)] for s in (7, 13)),
        backend,
    )
