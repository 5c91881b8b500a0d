"""perceiver_attention in plain PyTorch: definition, CPU path, oracle of the tests and baseline.

Forward and backward are both written out, because a backward kernel needs a definition to be
tested against as much as a forward one. Nothing here is fused, chunked or tuned. Half-precision
inputs are accumulated in float32; on a GPU its tensor cores multiply them, and weights are rounded
to their dtype, as in the kernels. A float64 call is a float64 oracle.

Shapes: N layer slices, S context tokens, P query rows (heads x latents), Z latent width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from csrc_triton import dispatch


def visible_bounds(inv_rms: Tensor) -> Tensor:
    """First visible token of each slice and one past the last, equal if there is none.

    Args:
        inv_rms: [N, S], 0 for a masked token.

    Returns:
        [N, 2] int32.
    """
    slices, tokens = inv_rms.shape
    if tokens == 0:
        return inv_rms.new_zeros(slices, 2, dtype=torch.int32)
    visible, token = inv_rms != 0, torch.arange(tokens, dtype=torch.int32, device=inv_rms.device)
    high = torch.where(visible, token + 1, 0).amax(-1)
    low = torch.where(visible, token, tokens).amin(-1)
    return torch.stack([torch.minimum(low, high), high], -1).to(torch.int32)


def perceiver_attention(
    query: Tensor, context: Tensor, inv_rms: Tensor, bounds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Absorbed cross-attention over an RMS-normalized context; ``bounds`` is not needed here."""
    compute = dispatch.product_dtype(query)
    q, x = query.to(compute), context.to(compute)
    scores = dispatch.wide_product(q, x.mT)
    norm = inv_rms.to(scores.dtype)
    if scores.shape[-1] == 0:
        return torch.zeros_like(query), scores.new_full(scores.shape[:-1], -torch.inf)
    # Passes over the scores cost a fifth of the products on a CPU, so there are few, all in place
    # where autograd does not need what they replace.
    place = None if scores.requires_grad or norm.requires_grad else scores
    scores = torch.mul(scores, norm[:, None], out=place)
    masked = norm == 0
    # A CPU's slowest pass; on a GPU the question would cost a wait for the device.
    if not masked.is_cpu or masked.any():
        scores.masked_fill_(masked[:, None], -torch.inf)
    largest = scores.amax(-1, keepdim=True)
    # A row that sees nothing has -inf: subtract 0 there, so that exp gives 0 and not NaN.
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    weights = torch.exp(torch.sub(scores, largest, out=place), out=place)
    total = weights.sum(-1, keepdim=True)
    lse = (largest + total.log())[..., 0]
    out = dispatch.wide_product(torch.mul(weights, norm[:, None], out=place).to(compute), x)
    return (out / total.masked_fill(total == 0, 1.0)).to(query.dtype), lse


def differentiable_perceiver_attention(
    query: Tensor, context: Tensor, inv_rms: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`perceiver_attention`, every derivative of which is finite, in blind rows too."""
    wide = torch.promote_types(query.dtype, torch.float32)
    norm, context = inv_rms.to(wide), context.to(wide)
    masked = (norm == 0)[:, None]
    blind = masked.all(-1, keepdim=True)
    scores = torch.einsum("npz,nsz->nps", query.to(wide), context) * norm[:, None]
    # A row that sees nothing gets the scores of one that sees everything, which are not used.
    scores = scores.masked_fill(masked & ~blind, -torch.inf)
    probs = torch.softmax(scores, -1).masked_fill(masked, 0.0)
    out = torch.einsum("nps,nsz->npz", probs * norm[:, None], context)
    lse = torch.logsumexp(scores, -1).masked_fill(blind[..., 0], -torch.inf)
    return out.to(query.dtype), lse


def perceiver_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    context: Tensor,
    inv_rms: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`perceiver_attention` for query, context and inv_rms."""
    compute = dispatch.product_dtype(query)
    q, x, d_out = (t.to(compute) for t in (query, context, grad_out))
    dots = dispatch.wide_product(q, x.mT)
    norm = inv_rms.to(dots.dtype)
    scores = (dots * norm[:, None]).masked_fill((norm == 0)[:, None], -torch.inf)
    probs = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    d_dots = dispatch.wide_product(d_out, x.mT)
    delta = (d_out.to(dots.dtype) * out).sum(-1) - grad_lse
    d_scores = probs * (d_dots * norm[:, None] - delta[..., None])
    d_query = dispatch.wide_product((d_scores * norm[:, None]).to(compute), x)
    d_normed = dispatch.wide_product(d_scores.to(compute).mT, q)
    d_normed += dispatch.wide_product(probs.to(compute).mT, d_out)
    d_norm = (d_normed * x).sum(-1).masked_fill(norm == 0, 0.0)
    d_context = d_normed * norm[..., None]
    return d_query.to(query.dtype), d_context.to(context.dtype), d_norm.to(inv_rms.dtype)
