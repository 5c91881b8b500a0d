"""Rank latents to LoRA factors: unit norm, per-layer head, scalers, split, placement in rank slots.

Roofline: one pass over the head, L·Z·(d_in + d_out) weights: 57.7 M at the 500M shape, 115 MB in
bf16, 58 us on an A100 (2.0 TB/s), 27 us at 4.3 TB/s; 125.8 M at 2.2B, 126 us and 59 us. The rows
(B·R) are few, so it stays memory bound up to about 180 of them. The row norm commutes with the
GEMM and belongs in its epilogue, as do the scalers.

Where the kernel cannot win: far above 180 rows the product is all that counts and cuBLAS is as
fast or faster; the backward is batched products and nothing else, on both paths. The rules of
``faster.json`` say up to which row.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from csrc_triton.arguments import Arguments
from csrc_triton.dispatch import Op
from csrc_triton.rank_projection import reference
from csrc_triton.rank_projection.self_check import SELF_CHECKS
from csrc_triton.transforms import (
    differentiable_backward,
    refuse_forward_mode,
    register_autocast,
    run_plain,
    transformed,
)


def _load_kernels() -> ModuleType:
    from csrc_triton.rank_projection import kernels

    return kernels


OP = Op("rank_projection", reference, _load_kernels, SELF_CHECKS)


def _implementation(direction: str, latents: Tensor, *others: Tensor | None) -> ModuleType:
    groups, chunks, layers, rank, _ = latents.shape
    shape = {"direction": direction, "rows": groups * chunks * rank, "layers": layers}
    return OP.implementation(latents, *others, **shape)


def _check(
    latents: Tensor,
    weight: Tensor,
    scaler_a: Tensor,
    scaler_b: Tensor,
    bias_a: Tensor | None,
    bias_b: Tensor | None,
    d_in: int,
    d_out: int,
) -> None:
    check = Arguments("rank_projection")
    check.shape("latents", latents, "G", "C", "L", "R", "Z")
    _, _, layers, rank, depth = latents.shape
    check.shape("weight", weight, layers, depth, "W")
    check.require(weight.shape[2] >= d_in + d_out, "weight",
                  f"[{layers}, {depth}, {d_in + d_out} or more]", list(weight.shape))  # fmt: skip
    check.shape("scaler_a", scaler_a, layers, rank)
    check.shape("scaler_b", scaler_b, layers, rank)
    check.require((bias_a is None) == (bias_b is None), "bias_b", "passed if and only if bias_a is",
                  "one of the two")  # fmt: skip
    if bias_a is not None:
        check.shape("bias_a", bias_a, layers, "R'", d_in)
        check.shape("bias_b", bias_b, layers, bias_a.shape[1], d_out)
    tensors = {
        "weight": weight, "scaler_a": scaler_a, "scaler_b": scaler_b, "bias_a": bias_a,
        "bias_b": bias_b,
    }  # fmt: skip
    check.floating(latents=latents, **tensors)
    check.device(latents.device, **tensors)


@torch.library.custom_op("v2l::rank_projection", mutates_args=())
def _forward(
    latents: Tensor,
    weight: Tensor,
    scaler_a: Tensor,
    scaler_b: Tensor,
    bias_a: Tensor | None,
    bias_b: Tensor | None,
    d_in: int,
    d_out: int,
) -> tuple[Tensor, Tensor]:
    tensors = (latents, weight, scaler_a, scaler_b, bias_a, bias_b)
    refuse_forward_mode("rank_projection", *tensors)
    _check(*tensors, d_in, d_out)
    return _implementation("forward", *tensors).rank_projection(*tensors, d_in, d_out)


@torch.library.custom_op("v2l::rank_projection_backward", mutates_args=())
def _backward(
    grad_a: Tensor,
    grad_b: Tensor,
    latents: Tensor,
    weight: Tensor,
    scaler_a: Tensor,
    scaler_b: Tensor,
    d_in: int,
    d_out: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (latents, weight, scaler_a, scaler_b)
    return _implementation("backward", *tensors, grad_a, grad_b).rank_projection_backward(
        grad_a, grad_b, *tensors, d_in, d_out
    )


@_forward.register_fake
def _(latents, weight, scaler_a, scaler_b, bias_a, bias_b, d_in, d_out):
    groups, chunks, layers, rank, _ = latents.shape
    total_a = chunks * rank + (0 if bias_a is None else bias_a.shape[1])
    total_b = chunks * rank + (0 if bias_b is None else bias_b.shape[1])
    return (
        latents.new_empty(groups, layers, total_a, d_in),
        latents.new_empty(groups, layers, total_b, d_out),
    )


@_backward.register_fake
def _(grad_a, grad_b, latents, weight, scaler_a, scaler_b, d_in, d_out):
    wide = torch.promote_types(latents.dtype, torch.float32)
    generated = latents.shape[1] * latents.shape[3]

    def bias(grad):
        shape = (grad.shape[1], grad.shape[2] - generated, grad.shape[3])
        return grad.new_empty(shape, dtype=wide)

    return (
        latents.new_empty(latents.shape),
        weight.new_empty(weight.shape),
        scaler_a.new_empty(scaler_a.shape),
        scaler_b.new_empty(scaler_b.shape),
        bias(grad_a),
        bias(grad_b),
    )


# A normalization: it keeps its inputs' precision, as layer_norm does.
register_autocast("rank_projection", 0)
register_autocast("rank_projection_backward", 0)


def _plain(
    latents: Tensor,
    weight: Tensor,
    scaler_a: Tensor,
    scaler_b: Tensor,
    bias_a: Tensor | None,
    bias_b: Tensor | None,
    d_in: int,
    d_out: int,
) -> tuple[Tensor, Tensor]:
    """The op in plain torch operations, whose derivatives PyTorch knows."""
    args = latents, weight, scaler_a, scaler_b, bias_a, bias_b, d_in, d_out
    _check(*args)
    return reference.rank_projection(*args)


def _setup(ctx, inputs, output) -> None:
    latents, weight, scaler_a, scaler_b, bias_a, bias_b, ctx.d_in, ctx.d_out = inputs
    ctx.save_for_backward(latents, weight, scaler_a, scaler_b, bias_a, bias_b)


def _autograd(ctx, grad_a, grad_b):
    if torch.is_grad_enabled():
        # create_graph=True: these gradients are to be differentiated again.
        grads = differentiable_backward(
            lambda *tensors: reference.rank_projection(*tensors, ctx.d_in, ctx.d_out),
            ctx.saved_tensors,
            (grad_a, grad_b),
        )
        return *grads, None, None
    *tensors, bias_a, bias_b = ctx.saved_tensors
    *grads, d_bias_a, d_bias_b = _backward(
        grad_a.contiguous(), grad_b.contiguous(), *tensors, ctx.d_in, ctx.d_out
    )
    d_biases = (
        None if bias is None else d_bias.to(bias.dtype)
        for bias, d_bias in ((bias_a, d_bias_a), (bias_b, d_bias_b))
    )
    return *grads, *d_biases, None, None


_forward.register_autograd(_autograd, setup_context=_setup)


def rank_projection(
    latents: Tensor,
    weight: Tensor,
    scaler_a: Tensor,
    scaler_b: Tensor,
    bias_a: Tensor | None = None,
    bias_b: Tensor | None = None,
    *,
    d_in: int,
    d_out: int,
) -> tuple[Tensor, Tensor]:
    """LoRA factors of C chunks a group, the shared bias adapter behind them.

    Args:
        latents: [G, C, L, R, Z]; each row is divided by its L2 norm (a zero row stays zero).
        weight: [L, Z, W] head, W >= d_in + d_out; columns d_in of A, then d_out of B, then unused.
        scaler_a, scaler_b: [L, R].
        bias_a, bias_b: [L, R', d_in] and [L, R', d_out], or None.

    Returns:
        A [G, L, C·R (+ R'), d_in] and B [G, L, C·R (+ R'), d_out] of latents' dtype, chunks in
        order, then the bias. Differentiable in every tensor, any number of times and in both modes;
        what differentiates in forward mode or more than once, and every transform of
        ``torch.func``, runs in plain torch operations. Autocast does not change its precision.

    Raises:
        ValueError: an argument's shape, dtype or device does not fit.
    """
    args = latents, weight, scaler_a, scaler_b, bias_a, bias_b, d_in, d_out
    return run_plain(_plain, args, 0) if transformed() else _forward(*args)
