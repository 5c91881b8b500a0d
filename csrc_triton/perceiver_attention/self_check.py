"""What the perceiver_attention kernels must compute exactly; see :mod:`csrc_triton.self_check`."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from csrc_triton.self_check import Run, SelfCheck, generator, random_signs, sparse_ones


def _attention(device: torch.device, small: bool) -> Run:
    """Each query equals a token of the context, whose score exceeds all others by so much that its
    probability is exactly 1 and theirs 0; the tokens come from all tiles."""
    slices, rows, tokens, width = (1, 16, 64, 256) if small else (4, 128, 1024, 512)
    context = random_signs(generator(), 1.0, slices, tokens, width).to(device)
    query = context[:, torch.arange(rows) * (tokens // rows) + 1]
    norm = torch.ones(slices, tokens, device=device)

    def run(implementation: ModuleType, dtype: torch.dtype) -> list[Tensor]:
        inputs = query.to(dtype), context.to(dtype), norm
        out, lse = implementation.perceiver_attention(*inputs)
        cotangents = sparse_ones(out), torch.zeros_like(lse)
        grads = implementation.perceiver_attention_backward(*cotangents, *inputs, out, lse)
        # The gradient of the norm multiplies by a rounded probability, in float32.
        return [out, *grads[:2]]

    return run


SELF_CHECKS: dict[str, SelfCheck] = {"attention": _attention}
