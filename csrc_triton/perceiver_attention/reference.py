"""perceiver_attention in plain PyTorch: definition, CPU path, oracle of the tests and baseline.

Forward and backward are both written out, because a backward kernel needs a definition to be
tested against as much as a forward one. Nothing here is fused, chunked or tuned. Half-precision
inputs are accumulated in float32, and a float64 call is a float64 oracle.

Shapes: N layer slices, S context tokens, P query rows (heads x latents), Z latent width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def perceiver_attention(query: Tensor, context: Tensor, inv_rms: Tensor) -> tuple[Tensor, Tensor]:
    """Absorbed cross-attention over an RMS-normalized context; see ``perceiver_attention.py``."""
    wide = torch.promote_types(query.dtype, torch.float32)
    norm = inv_rms.to(wide)
    scores = torch.einsum("npz,nsz->nps", query.to(wide), context.to(wide)) * norm[:, None]
    scores = scores.masked_fill((norm == 0)[:, None], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    # A row that sees nothing has lse = -inf: subtract 0 there, so that exp gives 0 and not NaN.
    probs = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    out = torch.einsum("nps,nsz->npz", probs * norm[:, None], context.to(wide))
    return out.to(query.dtype), lse


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
    wide = torch.promote_types(query.dtype, torch.float32)
    q, x, norm, d_out = (t.to(wide) for t in (query, context, inv_rms, grad_out))
    dots = torch.einsum("npz,nsz->nps", q, x)
    scores = (dots * norm[:, None]).masked_fill((norm == 0)[:, None], -torch.inf)
    probs = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    d_dots = torch.einsum("npz,nsz->nps", d_out, x)
    delta = (d_out * out.to(wide)).sum(-1) - grad_lse
    d_scores = probs * (d_dots * norm[:, None] - delta[..., None])
    d_normed = torch.einsum("nps,npz->nsz", d_scores, q)
    d_normed = d_normed + torch.einsum("nps,npz->nsz", probs, d_out)
    d_query = torch.einsum("nps,nsz->npz", d_scores * norm[:, None], x)
    d_norm = (d_normed * x).sum(-1).masked_fill(norm == 0, 0.0)
    d_context = d_normed * norm[..., None]
    return d_query.to(query.dtype), d_context.to(context.dtype), d_norm.to(inv_rms.dtype)
