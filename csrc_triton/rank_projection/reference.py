"""rank_projection in plain PyTorch: definition, CPU path, oracle of the tests and baseline.

Forward and backward are both written out. Half-precision inputs are accumulated in float32; on a
GPU its tensor cores multiply them. A float64 call is a float64 oracle.

The row norm commutes with the product. The backward pass is products and little else: with
E_s = G_s W_sᵀ for the gradients G_s of side s, d scaler_s[r] = Σ unit · E_s,
d unit = Σ_s scaler_s E_s and d W_s = (unit · scaler_s)ᵀ G_s. The forward product is not recomputed,
and all pointwise work is on [rows, Z]. The kernels use it, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from csrc_triton import dispatch


def _compute_dtype(latents: Tensor, weight: Tensor) -> torch.dtype:
    wider = latents if latents.dtype.itemsize >= weight.dtype.itemsize else weight
    return dispatch.product_dtype(wider)


def _inverse_norm(rows: Tensor) -> Tensor:
    """1 / L2 norm over the last axis of rows in float32 or wider; 0 for a zero row."""
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    tiny = torch.finfo(rows.dtype).tiny
    return torch.where(norm > 0, 1.0 / norm.clamp_min(tiny), torch.zeros_like(norm))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """[..., J] and [J, K] to [..., K], in float32 or wider."""
    return dispatch.wide_product(a.reshape(1, -1, a.shape[-1]), b[None])[0].view(
        *a.shape[:-1], b.shape[-1]
    )


def rank_projection(
    latents: Tensor, weight: Tensor, scaler_a: Tensor, scaler_b: Tensor, d_in: int, d_out: int
) -> tuple[Tensor, Tensor]:
    """Unit-norm rank latents times the head, split and scaled."""
    compute = _compute_dtype(latents, weight)
    columns = _product(latents.to(compute), weight[:, : d_in + d_out].to(compute))
    columns = columns * _inverse_norm(_wide(latents)).to(columns.dtype)
    a, b = (
        (part * scaler[:, None].to(part.dtype)).to(latents.dtype)
        for part, scaler in zip(columns.split([d_in, d_out], -1), (scaler_a, scaler_b), strict=True)
    )
    return a, b


def differentiable_rank_projection(
    latents: Tensor, weight: Tensor, scaler_a: Tensor, scaler_b: Tensor, d_in: int, d_out: int
) -> tuple[Tensor, Tensor]:
    """:func:`rank_projection` in operations whose derivatives PyTorch knows."""
    wide = torch.promote_types(latents.dtype, torch.float32)
    rows = latents.to(wide)
    columns = (rows * _inverse_norm(rows)) @ weight[:, : d_in + d_out].to(wide)
    a, b = columns.split([d_in, d_out], -1)
    a, b = a * scaler_a[:, None].to(wide), b * scaler_b[:, None].to(wide)
    return a.to(latents.dtype), b.to(latents.dtype)


def rank_projection_backward(
    grad_a: Tensor,
    grad_b: Tensor,
    latents: Tensor,
    weight: Tensor,
    scaler_a: Tensor,
    scaler_b: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for latents, weight, scaler_a and scaler_b."""
    compute = _compute_dtype(latents, weight)
    rows = _wide(latents)
    inverse = _inverse_norm(rows)
    unit = rows * inverse
    d_unit = torch.zeros_like(unit)
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    d_scalers, start = [], 0
    for grad, scaler in ((grad_a, scaler_a), (grad_b, scaler_b)):
        columns = slice(start, start := start + grad.shape[-1])
        narrow = grad.to(compute)
        pulled = _product(narrow, weight[:, columns].to(compute).mT).to(unit.dtype)
        scaled = scaler.to(unit.dtype)[:, None]
        d_unit += scaled * pulled
        d_scalers.append((unit * pulled).sum((0, 2)).to(scaler.dtype))
        scaled_rows = (unit * scaled).to(compute).flatten(0, 1)
        d_weight[:, columns] = _product(scaled_rows.mT, narrow.flatten(0, 1))
    d_weight[:, start:] = 0
    d_rows = inverse * (d_unit - unit * (unit * d_unit).sum(-1, keepdim=True))
    d_scaler_a, d_scaler_b = d_scalers
    return d_rows.to(latents.dtype), d_weight, d_scaler_a, d_scaler_b
