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
    latents: Tensor, weight: Tensor, scaler_a: Tensor, scaler_b: Tensor, d_in: int, d_out: int
) -> tuple[Tensor, Tensor]:
    """Unit-norm rank latents times the head, split and scaled."""
    unit, _ = _unit_rows(latents)
    columns = unit @ weight[:, : d_in + d_out].to(unit.dtype)
    a, b = (
        (part * scaler[:, None].to(unit.dtype)).to(latents.dtype)
        for part, scaler in zip(columns.split([d_in, d_out], -1), (scaler_a, scaler_b), strict=True)
    )
    return a, b


def rank_projection_backward(
    grad_a: Tensor,
    grad_b: Tensor,
    latents: Tensor,
    weight: Tensor,
    scaler_a: Tensor,
    scaler_b: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for latents, weight, scaler_a and scaler_b."""
    unit, inv_norm = _unit_rows(latents)
    wide = unit.dtype
    widths = [grad_a.shape[-1], grad_b.shape[-1]]
    used = weight[:, : sum(widths)].to(wide)
    d_columns, d_scalers = [], []
    for part, scaler, grad in zip(
        (unit @ used).split(widths, -1), (scaler_a, scaler_b), (grad_a, grad_b), strict=True
    ):
        d_columns.append(grad.to(wide) * scaler[:, None].to(wide))
        d_scalers.append((grad.to(wide) * part).sum((0, 2)).to(scaler.dtype))
    d_all = torch.cat(d_columns, -1)
    d_weight = torch.zeros_like(weight)
    d_weight[:, : sum(widths)] = unit.flatten(0, 1).mT @ d_all.flatten(0, 1)
    d_unit = d_all @ used.mT
    d_latents = inv_norm * (d_unit - unit * (unit * d_unit).sum(-1, keepdim=True))
    return d_latents.to(latents.dtype), d_weight, *d_scalers
