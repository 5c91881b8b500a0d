"""What the lora_linear kernels must compute exactly; see :mod:`csrc_triton.self_check`."""

from __future__ import annotations

from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from csrc_triton.self_check import Run, SelfCheck, generator, random_signs, sparse_ones


def _linear(tokens: int, device: torch.device, small: bool) -> Run:
    """Sparse signs everywhere; of four examples two share an adapter and one has none."""
    random = generator()
    d_in, d_out, rank = (96, 40, 16) if small else (2560, 960, 32)
    density = 0.1 if small else 0.03
    x = random_signs(random, density, 4, min(tokens, 3) if small else tokens, d_in)
    weight = random_signs(random, density, d_out, d_in)
    lora_a = random_signs(random, density, 3, rank, d_in)
    lora_b = random_signs(random, 0.25, 3, rank, d_out)
    inputs = [t.to(device) for t in (x, weight, lora_a, lora_b)]
    which = torch.tensor([2, 0, -1, 2], device=device), 1.0, None

    def run(implementation: ModuleType, dtype: torch.dtype) -> list[Tensor]:
        x, weight, a, b = (t.to(dtype) for t in inputs)
        y, u = implementation.lora_linear(x, weight, None, a, b, *which, True)
        grads = implementation.lora_linear_backward(sparse_ones(y), x, weight, a, b, *which, u)
        return [y, u, *grads]

    return run


SELF_CHECKS: dict[str, SelfCheck] = {
    "prefill": partial(_linear, 301),
    "decode": partial(_linear, 1),
}
