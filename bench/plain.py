"""The best plain PyTorch we know for every op, in the inputs' dtype: what a kernel has to beat.

An op's ``reference.py`` is its meaning and computes in float32 or wider; these give up that
for speed as a kernel does, with the fewest passes torch allows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def perceiver_attention(query: Tensor, context: Tensor, inv_rms: Tensor) -> tuple[Tensor, Tensor]:
    """The absorbed form: two batched products around a softmax; all tokens visible."""
    scores = torch.bmm(query, context.mT).float() * inv_rms[:, None]
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse[..., None]) * inv_rms[:, None]
    return torch.bmm(weights.to(query.dtype), context), lse


def rank_projection(
    latents: Tensor, head: Tensor, scaler_a: Tensor, scaler_b: Tensor, *, d_in: int, d_out: int
) -> tuple[Tensor, Tensor]:
    """As ``released.rank_projection``, in one product of two matrices."""
    a, b = (F.normalize(latents, dim=-1) @ head).split([d_in, d_out], -1)
    return a * scaler_a[:, None], b * scaler_b[:, None]


def lora_linear(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, index: Tensor, scale: float
) -> Tensor:
    """Gathered adapters and ``baddbmm``; every example has an adapter."""
    shrunk = torch.bmm(x, lora_a[index].mT) * scale
    return torch.baddbmm(F.linear(x, weight), shrunk, lora_b[index])


def gated_projection(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """gate and up as one product."""
    gated, raised = F.linear(x, torch.cat([gate, up])).chunk(2, -1)
    return F.linear(F.silu(gated) * raised, down)
