"""What the rank_projection kernel must compute exactly; see :mod:`csrc_triton.self_check`."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from csrc_triton.self_check import Run, SelfCheck, generator, random_signs


def _projection(device: torch.device, small: bool) -> Run:
    """Latents of norm 4 and scalers of 4: the factors are sums of signs."""
    random = generator()
    depth, d_in, d_out = (64, 40, 24) if small else (512, 2560, 960)
    order = torch.rand(1 if small else 8, 16, depth, generator=random).argsort(-1)
    latents = (order < 16).float() * (1 - 2 * (order % 2)).float()
    scaler = torch.full((16,), 4.0)
    weight = random_signs(random, 1.0, depth, d_in + d_out)
    inputs = [t.to(device) for t in (latents, weight, scaler, scaler)]

    def run(implementation: ModuleType, dtype: torch.dtype) -> list[Tensor]:
        args = [t.to(dtype) for t in inputs]
        return list(implementation.rank_projection(*args, d_in, d_out))

    return run


SELF_CHECKS: dict[str, SelfCheck] = {"projection": _projection}
