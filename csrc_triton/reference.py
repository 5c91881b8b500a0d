"""Every op in plain eager PyTorch: its meaning, its CPU path, the tests' oracle and a baseline.

Forward and backward are both written out, because a backward kernel needs a definition to be
tested against as much as a forward one. Nothing here is fused, chunked or tuned. Half-precision
inputs are accumulated in float32, and a float64 call is a float64 oracle.

Shapes: N layer slices, S context tokens, P query rows (heads x latents), Z latent width,
E examples, T tokens, D input width, n adapters, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# --- gated projection ------------------------------------------------------------------------


def gated_projection(
    x: Tensor, visible: Tensor | None, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """down(silu(gate(x)) * up(x)) with masked rows read as zeros; see ``gated_projection.py``."""
    if visible is not None:
        x = torch.where(visible[..., None], x, torch.zeros((), dtype=x.dtype, device=x.device))
    hidden = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    return hidden @ down.T


def gated_projection_backward(
    grad: Tensor, x: Tensor, visible: Tensor | None, gate: Tensor, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for x (zero at masked rows), gate, up and down; activations are recomputed."""
    if visible is not None:
        x = torch.where(visible[..., None], x, torch.zeros((), dtype=x.dtype, device=x.device))
    x, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    gated, raised = x @ gate.T, x @ up.T
    sigmoid = torch.sigmoid(gated)
    silu = gated * sigmoid
    d_hidden = grad @ down
    d_raised = d_hidden * silu
    d_gated = d_hidden * raised * (sigmoid + silu * (1 - sigmoid))
    d_x = d_gated @ gate + d_raised @ up
    if visible is not None:
        d_x = d_x * visible.reshape(-1, 1)
    return d_x, d_gated.T @ x, d_raised.T @ x, grad.T @ (silu * raised)


# --- perceiver attention ---------------------------------------------------------------------


def perceiver_attention(query: Tensor, context: Tensor, inv_rms: Tensor) -> tuple[Tensor, Tensor]:
    """Absorbed cross-attention over an RMS-normalized context; see ``perceiver_attention.py``."""
    wide = _accumulate_dtype(query.dtype)
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
    wide = _accumulate_dtype(query.dtype)
    norm, context = inv_rms.to(wide), context.to(wide)
    masked = (norm == 0)[:, None]
    blind = masked.all(-1, keepdim=True)
    scores = torch.einsum("npz,nsz->nps", query.to(wide), context) * norm[:, None]
    # A row that sees nothing gets the scores of one that sees everything, and no use is made of it.
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
    wide = _accumulate_dtype(query.dtype)
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


# --- rank projection -------------------------------------------------------------------------


def _unit_rows(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Rows divided by their L2 norm, and 1 / norm. A zero row stays zero."""
    wide = latents.to(_accumulate_dtype(latents.dtype))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    tiny = torch.finfo(wide.dtype).tiny
    inv_norm = torch.where(norm > 0, 1.0 / norm.clamp_min(tiny), torch.zeros_like(norm))
    return wide * inv_norm, inv_norm


def rank_projection(
    latents: Tensor,
    weight: Tensor,
    scaler_a: Tensor,
    scaler_b: Tensor,
    bias_a: Tensor | None,
    bias_b: Tensor | None,
    d_in: int,
    d_out: int,
) -> tuple[Tensor, Tensor]:
    """Unit-norm rank latents times the head, scaled, split and placed in rank slots."""
    groups, chunks, layers, rank, _ = latents.shape
    unit, _ = _unit_rows(latents)
    flat = torch.einsum("gclrz,lzw->glcrw", unit, weight[..., : d_in + d_out].to(unit.dtype))
    factors = []
    for part, scaler, bias in (
        (flat[..., :d_in], scaler_a, bias_a),
        (flat[..., d_in:], scaler_b, bias_b),
    ):
        scaled = part * scaler[:, None, :, None].to(unit.dtype)
        scaled = scaled.reshape(groups, layers, chunks * rank, part.shape[-1])
        if bias is not None:
            shared = bias.to(unit.dtype).expand(groups, *bias.shape)
            scaled = torch.cat([scaled, shared], dim=2)
        factors.append(scaled.to(latents.dtype).contiguous())
    return factors[0], factors[1]


def rank_projection_backward(
    grad_a: Tensor,
    grad_b: Tensor,
    latents: Tensor,
    weight: Tensor,
    scaler_a: Tensor,
    scaler_b: Tensor,
    d_in: int,
    d_out: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for latents, weight, scaler_a, scaler_b, bias_a and bias_b.

    The bias gradients are what stands in the slots after the generated ranks: [L, 0, d] when the
    forward had no bias.
    """
    groups, chunks, layers, rank, _ = latents.shape
    unit, inv_norm = _unit_rows(latents)
    wide = unit.dtype
    used = weight[..., : d_in + d_out].to(wide)
    flat = torch.einsum("gclrz,lzw->glcrw", unit, used)
    d_flat, d_scalers, d_biases = [], [], []
    for part, scaler, grad in (
        (flat[..., :d_in], scaler_a, grad_a),
        (flat[..., d_in:], scaler_b, grad_b),
    ):
        generated = grad[:, :, : chunks * rank].to(wide)
        generated = generated.reshape(groups, layers, chunks, rank, part.shape[-1])
        d_flat.append(generated * scaler[:, None, :, None].to(wide))
        d_scalers.append((generated * part).sum(dim=(0, 2, 4)).to(scaler.dtype))
        d_biases.append(grad[:, :, chunks * rank :].to(wide).sum(0))
    d_all = torch.cat(d_flat, dim=-1)
    d_weight = torch.zeros_like(weight)
    d_weight[..., : d_in + d_out] = torch.einsum("gclrz,glcrw->lzw", unit, d_all)
    d_unit = torch.einsum("glcrw,lzw->gclrz", d_all, used)
    d_latents = inv_norm * (d_unit - unit * (unit * d_unit).sum(-1, keepdim=True))
    return d_latents.to(latents.dtype), d_weight, *d_scalers, *d_biases


# --- lora linear -----------------------------------------------------------------------------


def _chosen(lora_a: Tensor, adapter_index: Tensor, ranks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Adapter of each example, [E], any where it has none; the rank slots it uses, [E, 1, r]."""
    adapters, rank, _ = lora_a.shape
    has_one = (adapter_index >= 0) & (adapter_index < adapters)
    index = torch.where(has_one, adapter_index, 0)
    used = has_one[:, None, None].expand(-1, 1, rank)
    if ranks is None:
        return index, used
    slots = torch.arange(rank, device=ranks.device)
    return index, used & (slots < ranks[index][:, None, None])


def _by_example(factors: Tensor, index: Tensor, used: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, r, d] -> [E, r, d], zero in slots that are not used, whatever stands there."""
    return torch.where(used.mT, factors[index].to(dtype), 0)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_index: Tensor,
    scale: float,
    ranks: Tensor | None,
    offsets: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """y = x W^T (+ bias) + u B_i, u = scale x A_i^T, i the adapter of each example, -1 for none.

    Waits for no device, but for packed input, whose examples are computed one by one.

    Returns y and u [tokens, r] of x's dtype, which the backward needs, zero in slots that are not
    used; [0, r] unless ``keep``.
    """
    if offsets is not None:
        return _packed_lora_linear(
            x, weight, bias, lora_a, lora_b, adapter_index, scale, ranks, offsets, keep
        )
    rank, wide = lora_a.shape[1], _accumulate_dtype(x.dtype)
    y = torch.nn.functional.linear(x, weight, bias)
    if lora_a.shape[0] == 0:
        return y, y.new_zeros(x[..., 0].numel() if keep else 0, rank)
    index, used = _chosen(lora_a, adapter_index, ranks)
    if ranks is not None:
        slots = torch.arange(rank, device=ranks.device)
        lora_b = torch.where((slots < ranks[:, None])[:, :, None], lora_b, 0)
    if lora_a.shape[0] > 1:
        # One adapter is not gathered: for a token that costs more than the product with it.
        lora_a, lora_b = lora_a[index], lora_b[index]
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    u = torch.where(used, ((x @ a.mT).to(wide) * scale).to(x.dtype), 0)
    # Chosen, not added as zeros: what an adapter holds cannot reach an example without one.
    y = y + torch.where(used.any(-1, keepdim=True), u @ b, 0)
    return y, u.reshape(-1, rank) if keep else u.new_empty(0, rank)


def lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_index: Tensor,
    scale: float,
    ranks: Tensor | None,
    offsets: Tensor | None,
    u: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, lora_a and lora_b; the weight is frozen; ``u`` as the forward kept it."""
    if offsets is not None:
        return _packed_lora_linear_backward(
            grad, x, weight, lora_a, lora_b, adapter_index, scale, ranks, offsets, u
        )
    if lora_a.shape[0] == 0:
        return grad @ weight, torch.zeros_like(lora_a), torch.zeros_like(lora_b)
    index, used = _chosen(lora_a, adapter_index, ranks)
    a, b = (_by_example(t, index, used, x.dtype) for t in (lora_a, lora_b))
    d_u = (torch.bmm(grad, b.mT).to(_accumulate_dtype(x.dtype)) * scale).to(x.dtype)
    d_x = torch.baddbmm(grad @ weight, d_u, a)
    # A product, because adding up by index has no fixed order on a GPU.
    owners = adapter_index == torch.arange(lora_a.shape[0], device=x.device)[:, None]

    def by_adapter(per_example: Tensor, like: Tensor) -> Tensor:
        summed = owners.to(per_example.dtype) @ per_example.flatten(1)
        return summed.view(like.shape).to(like.dtype)

    d_a = by_adapter(torch.bmm(d_u.mT, x), lora_a)
    d_b = by_adapter(torch.bmm(u.view(d_u.shape).mT, grad), lora_b)
    return d_x, d_a, d_b


def differentiable_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_index: Tensor,
    scale: float,
    ranks: Tensor | None,
    offsets: Tensor | None,
) -> Tensor:
    """y of :func:`lora_linear`, every derivative of which is finite and reads used slots only."""
    y = torch.nn.functional.linear(x, weight, bias)
    if lora_a.shape[0] == 0 or adapter_index.numel() == 0:
        return y
    if offsets is not None:
        # Every token as an example of its own; those behind the last example have no adapter.
        tokens = torch.arange(x.shape[0], device=x.device)
        example = torch.searchsorted(offsets[1:].contiguous(), tokens, right=True)
        index = adapter_index[example.clamp_max(adapter_index.numel() - 1)]
        adapter_index = torch.where(example < adapter_index.numel(), index, -1)
        x = x[:, None]
    index, used = _chosen(lora_a, adapter_index, ranks)
    a, b = (_by_example(t, index, used, x.dtype) for t in (lora_a, lora_b))
    u = ((x @ a.mT).to(_accumulate_dtype(x.dtype)) * scale).to(x.dtype)
    update = u @ b
    return y + (update if offsets is None else update[:, 0])


def _packed_rows(
    lora_a: Tensor, adapter_index: Tensor, ranks: Tensor | None, offsets: Tensor
) -> Iterator[tuple[int, int, slice]]:
    """Adapter, its rank and the tokens of each packed example that has an adapter and tokens."""
    bounds = offsets.tolist()
    limits = [lora_a.shape[1]] * lora_a.shape[0] if ranks is None else ranks.tolist()
    for i, first, stop in zip(adapter_index.tolist(), bounds, bounds[1:], strict=False):
        if i >= 0 and stop > first:
            yield i, limits[i], slice(first, stop)


def _packed_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_index: Tensor,
    scale: float,
    ranks: Tensor | None,
    offsets: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    y = torch.nn.functional.linear(x, weight, bias)
    u = x.new_zeros(x.shape[0], lora_a.shape[1])
    wide = _accumulate_dtype(x.dtype)
    for i, r, rows in _packed_rows(lora_a, adapter_index, ranks, offsets):
        u[rows, :r] = ((x[rows] @ lora_a[i, :r].to(x.dtype).T).to(wide) * scale).to(x.dtype)
        y[rows] += u[rows, :r] @ lora_b[i, :r].to(x.dtype)
    return y, u if keep else u[:0].clone()


def _packed_lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_index: Tensor,
    scale: float,
    ranks: Tensor | None,
    offsets: Tensor,
    u: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    d_x, d_a, d_b = grad @ weight, torch.zeros_like(lora_a), torch.zeros_like(lora_b)
    wide = _accumulate_dtype(x.dtype)
    for i, r, rows in _packed_rows(lora_a, adapter_index, ranks, offsets):
        a, b = lora_a[i, :r].to(x.dtype), lora_b[i, :r].to(x.dtype)
        d_u = ((grad[rows] @ b.T).to(wide) * scale).to(x.dtype)
        d_x[rows] += d_u @ a
        d_a[i, :r] += d_u.T @ x[rows]
        d_b[i, :r] += u[rows, :r].T @ grad[rows]
    return d_x, d_a, d_b
