"""Absorbed Perceiver cross-attention over an RMS-normalized context.

No bias and no query or key norm stands between the context and the scores, so the key projection
folds into the query and the value projection into the output, exactly. What remains is attention of
P = heads x latents query rows of width Z over the context itself, without K, V or repeated heads.

Roofline, per token and block at Z = 512, P = 128: 4·P·Z = 262 kFLOP against 1 KB of context in
bf16, 256 FLOP/B. Nine blocks over S = 832 tokens and N = 1,536 slices are 3.0 TFLOP: floor 9.7 ms
on an A100 (312 TFLOP/s), 3.8 ms at 788 TFLOP/s. The released op order (K, V, repeat, concat,
scores) moves 54.8 KB a token and block.

Against the same form in plain torch (two batched products around a softmax) the kernel saves half
of the bytes, 27 of 53 GB over those nine blocks, 6 of 12 ms at 4.3 TB/s. It cannot win in float32,
where no tensor core helps and its tiles of 16 rows read the context P / 16 times, nor above
Z = 512, which it refuses; below some hundred tokens launches decide.
``faster.json`` holds these limits.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from csrc_triton.dispatch import (
    Arguments,
    Op,
    Run,
    SelfCheck,
    generator,
    random_signs,
    sparse_ones,
)
from csrc_triton.perceiver_attention import reference
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


def _attention(
    plan: tuple[int, bool] | None, copies: bool, device: torch.device, small: bool
) -> Run:
    """Each query equals tokens of the context, whose scores exceed all others by so much that their
    probabilities are equal and all others are 0.

    Args:
        plan: of the kernels, see ``kernels.split_plan``; None for the one they choose.
        copies: whether a query equals one token of every 32, so that the first tile has its largest
            score. Else it equals one token, and the tokens of the queries come from all tiles.
    """
    slices, rows, tokens, width = (1, 16, 64, 256) if small else (4, 128, 1024, 512)
    context = random_signs(generator(), 1.0, slices, tokens, width).to(device)
    at = torch.arange(rows, device=device)
    if copies:
        context = context[:, torch.arange(tokens, device=device) % 32]
        query = context[:, at % 32]
    else:
        query = context[:, at * (tokens // rows) + 1]
    norm = torch.ones(slices, tokens, device=device)

    def run(implementation: ModuleType, dtype: torch.dtype) -> list[Tensor]:
        inputs = query.to(dtype), context.to(dtype), norm
        options = {} if implementation is reference or plan is None else {"plan": plan}
        out, lse = implementation.perceiver_attention(*inputs, **options)
        if copies:
            # Probabilities are equal up to a rounding in float32, which this undoes.
            return [out.to(torch.bfloat16).to(dtype)]
        cotangents = sparse_ones(out), torch.zeros_like(lse)
        grads = implementation.perceiver_attention_backward(*cotangents, *inputs, out, lse)
        # The gradient of the norm multiplies by a rounded probability, in float32.
        return [out, *grads[:2]]

    return run


# Four slices are split on a GPU; training has enough slices not to, and fixes the reference, which
# the last check forces the kernels to replace.
SELF_CHECKS: dict[str, SelfCheck] = {
    "split": partial(_attention, None, False),
    "unsplit": partial(_attention, (1, True), True),
    "fallback": partial(_attention, (1, True), False),
}
OP = Op("perceiver_attention", reference, _load_kernels, SELF_CHECKS)


def _implementation(query: Tensor, context: Tensor, *others: Tensor | None) -> ModuleType:
    slices, rows, width = query.shape
    shape = {"slices": slices, "rows": rows, "tokens": context.shape[1], "width": width}
    return OP.implementation(query, context, *others, **shape)


def _check(query: Tensor, context: Tensor, inv_rms: Tensor, bounds: Tensor | None) -> None:
    check = Arguments("perceiver_attention")
    check.shape("query", query, "N", "P", "Z")
    slices, _, width = query.shape
    check.shape("context", context, slices, "S", width)
    check.shape("inv_rms", inv_rms, *context.shape[:2])
    check.shape("bounds", bounds, slices, 2)
    check.floating(query=query, inv_rms=inv_rms)
    check.dtype(query.dtype, context=context)
    if bounds is not None:
        check.dtype(torch.int32, bounds=bounds)
    check.device(query.device, context=context, inv_rms=inv_rms, bounds=bounds)


@torch.library.custom_op("v2l::perceiver_attention", mutates_args=())
def _forward(
    query: Tensor, context: Tensor, inv_rms: Tensor, bounds: Tensor | None
) -> tuple[Tensor, Tensor]:
    refuse_forward_mode("perceiver_attention", query, context, inv_rms)
    _check(query, context, inv_rms, bounds)
    implementation = _implementation(query, context, inv_rms, bounds)
    return implementation.perceiver_attention(query, context, inv_rms, bounds)


@_forward.register_fake
def _(query, context, inv_rms, bounds):
    # A call with one argument on the meta device ends up here.
    _check(query, context, inv_rms, bounds)
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


def _plain(
    query: Tensor, context: Tensor, inv_rms: Tensor, bounds: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch operations, whose derivatives PyTorch knows."""
    _check(query, context, inv_rms, bounds)
    return reference.differentiable_perceiver_attention(query, context, inv_rms)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3], *output)


def _autograd(ctx, grad_out, grad_lse):
    if torch.is_grad_enabled():
        # create_graph=True: these gradients will be differentiated again.
        grads = differentiable_backward(
            reference.differentiable_perceiver_attention,
            ctx.saved_tensors[:3],
            (grad_out, grad_lse),
        )
    else:
        grads = _backward(grad_out.contiguous(), grad_lse.contiguous(), *ctx.saved_tensors)
    return *grads, None


_forward.register_autograd(_autograd, setup_context=_setup)


def perceiver_attention(
    query: Tensor, context: Tensor, inv_rms: Tensor, bounds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out_i = sum_s p_is ĉ_s with p = softmax(q_i · ĉ_s) over visible s and ĉ_s = inv_rms_s · c_s.

    Args:
        query: [N, P, Z] absorbed queries: W_k^T q, times the context norm's weight and the softmax
            scale.
        context: [N, S, Z] raw (not normalized) context of query's dtype; finite everywhere.
        inv_rms: [N, S] float32 or wider, 1 / rms of each visible token and 0 for a masked one: norm
            and mask in one tensor, which serves every block.
        bounds: ``visible_bounds(inv_rms)``, [N, 2] int32, the range of tokens that the kernels
            read; computed by every call without one. It changes no result.

    Returns:
        out [N, P, Z] of query's dtype and lse [N, P], the natural log-sum-exp of the scores in
        float32 or wider. A row that sees no token has out = 0 and lse = -inf, so that partial
        results (over the appended latents, for example) merge by log-sum-exp. Differentiable in all
        inputs any number of times, in reverse and forward mode; higher derivatives, forward mode
        and the transforms of ``torch.func`` run in plain PyTorch operations. Under autocast, query
        and context are cast as by ``F.scaled_dot_product_attention``.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
        RuntimeError: ``V2L_BACKEND=triton`` and the kernels cannot serve the call.
    """
    if transformed():
        return run_plain(_plain, (query, context, inv_rms, bounds), _CAST)
    return _forward(query, context, inv_rms, bounds)
