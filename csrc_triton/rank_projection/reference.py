"""rank_projection in plain PyTorch: definition, CPU path, oracle of the tests and baseline.

Forward and backward are both written out. Half-precision inputs are accumulated in float32, and a
float64 call is a float64 oracle.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _unit_rows(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Rows divided by their L2 norm, and 1 / norm. A zero row stays zero."""
    wide = latents.to(torch.promote_types(latents.dtype, torch.float32))
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
