"""Absorbed Perceiver cross-attention over an RMS-normalized context.

No bias and no query/key norm stand between the context and the scores, so the key projection folds
into the query and the value projection into the output, exactly. What is left attends with
P = heads x latents query rows of width Z to the context itself, no K, V or repeat in between.

Roofline, per token and block at Z = 512, P = 128: 4·P·Z = 262 kFLOP against 1 KB of context in
bf16, 256 FLOP/B. Nine blocks over S = 832 tokens and N = 1,536 slices are 3.0 TFLOP: floor 9.7 ms
on an A100 (312 TFLOP/s), 3.8 ms at 788 TFLOP/s. The released op order (K, V, repeat, concat,
scores) moves 54.8 KB a token and block.

Against the same form in plain torch (two batched products around a softmax) the kernel saves half
of the bytes, 27 of 53 GB over those nine blocks, 6 of 12 ms at 4.3 TB/s. It cannot win in float32,
where no tensor core helps and its tiles of 16 rows read the context P / 16 times, nor above
Z = 512, which it refuses; below some hundred tokens launches decide.
``faster.json`` draws the line.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from csrc_triton.dispatch import Op
from csrc_triton.perceiver_attention import reference
from csrc_triton.perceiver_attention.self_check import SELF_CHECKS
from csrc_triton.transforms import (
    differentiable_backward,
    refuse_forward_mode,
    register_autocast,
    run_plain,
    transformed,
)


def _load_kernels() -> ModuleType:
    from csrc_triton.perceiver_attention import kernels

    return kernels


OP = Op("perceiver_attention", reference, _load_kernels, SELF_CHECKS)


def _implementation(query: Tensor, context: Tensor, *others: Tensor) -> ModuleType:
    slices, rows, width = query.shape
    shape = {"slices": slices, "rows": rows, "tokens": context.shape[1], "width": width}
    return OP.implementation(query, context, *others, **shape)


@torch.library.custom_op("v2l::perceiver_attention", mutates_args=())
def _forward(query: Tensor, context: Tensor, inv_rms: Tensor) -> tuple[Tensor, Tensor]:
    refuse_forward_mode("perceiver_attention", query, context, inv_rms)
    _check(query, context, inv_rms)
    implementation = _implementation(query, context, inv_rms)
    return implementation.perceiver_attention(query, context, inv_rms)


@_forward.register_fake
def _(query, context, inv_rms):
    # A single argument on the meta device brings the call here.
    _check(query, context, inv_rms)
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=wide)


@torch.library.custom_op("v2l::perceiver_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    context: Tensor,
    inv_rms: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    implementation = _implementation(query, context, inv_rms, grad_out, grad_lse, out, lse)
    return implementation.perceiver_attention_backward(
        grad_out, grad_lse, query, context, inv_rms, out, lse
    )


@_backward.register_fake
def _(grad_out, grad_lse, query, context, inv_rms, out, lse):
    return (
        query.new_empty(query.shape),
        context.new_empty(context.shape),
        inv_rms.new_empty(inv_rms.shape),
    )


# query and context, as scaled_dot_product_attention; the norm is float32 or wider.
_CAST = 2
register_autocast("perceiver_attention", _CAST)
register_autocast("perceiver_attention_backward", 0)


def _plain(query: Tensor, context: Tensor, inv_rms: Tensor) -> tuple[Tensor, Tensor]:
    """The op in plain torch operations, whose derivatives PyTorch knows."""
    _check(query, context, inv_rms)
    return reference.differentiable_perceiver_attention(query, context, inv_rms)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)


def _autograd(ctx, grad_out, grad_lse):
    if torch.is_grad_enabled():
        # create_graph=True: these gradients are to be differentiated again.
        return tuple(
            differentiable_backward(
                reference.differentiable_perceiver_attention,
                ctx.saved_tensors[:3],
                (grad_out, grad_lse),
            )
        )
    return _backward(grad_out.contiguous(), grad_lse.contiguous(), *ctx.saved_tensors)


_forward.register_autograd(_autograd, setup_context=_setup)


def _check(query: Tensor, context: Tensor, inv_rms: Tensor) -> None:
    """One line that names the argument, before anything is launched."""
    if query.dim() != 3 or not query.is_floating_point():
        raise ValueError(
            f"query must be floating point [N, P, Z], got {query.dtype} {tuple(query.shape)}"
        )
    slices, _, width = query.shape
    if context.dim() != 3 or context.shape[0] != slices or context.shape[2] != width:
        raise ValueError(
            f"context must be [{slices}, S, {width}] like query, got {tuple(context.shape)}"
        )
    if inv_rms.shape != context.shape[:2]:
        raise ValueError(
            f"inv_rms must be {tuple(context.shape[:2])} like context, got {tuple(inv_rms.shape)}"
        )
    if context.dtype != query.dtype:
        raise ValueError(f"context must be {query.dtype} like query, got {context.dtype}")
    if not inv_rms.is_floating_point():
        raise ValueError(f"inv_rms must be floating point, got {inv_rms.dtype}")
    for name, tensor in (("context", context), ("inv_rms", inv_rms)):
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on {query.device} like query, got {tensor.device}")


def perceiver_attention(query: Tensor, context: Tensor, inv_rms: Tensor) -> tuple[Tensor, Tensor]:
    """out_i = sum_s p_is ĉ_s with p = softmax(q_i · ĉ_s) over visible s and ĉ_s = inv_rms_s · c_s.

    Args:
        query: [N, P, Z] absorbed queries: W_k^T q, times the context norm's weight and the
            softmax scale.
        context: [N, S, Z] raw (not normalized) context of query's dtype; finite everywhere.
        inv_rms: [N, S] 1 / rms of each visible token and 0 for a masked one, float32 or wider. It
            is norm and mask in one and serves every block.

    Returns:
        out [N, P, Z] of query's dtype and the natural log-sum-exp lse [N, P] of the scores
        (float32 or wider). A row with no visible token gives out = 0 and lse = -inf, so partial
        results, the appended latents for one, merge by log-sum-exp. Differentiable in all inputs,
        any number of times and in both modes; what differentiates in forward mode or more than
        once, and every transform of ``torch.func``, runs in plain torch operations. Under
        autocast, query and context are cast as by ``F.scaled_dot_product_attention``.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
        RuntimeError: ``V2L_BACKEND`` asks for kernels that cannot serve the call.
    """
    if transformed():
        return run_plain(_plain, (query, context, inv_rms), _CAST)
    return _forward(query, context, inv_rms)
