"""Small disturbances for training frames, so that codec noise and resizing do not matter later."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def augment(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Random blur, gain, offset and noise; float [N, 3, H, W] in 0..255 -> the same."""
    count = len(frames)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator) * (high - low) + low

    soft = F.avg_pool2d(F.pad(frames, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mixed = torch.lerp(frames, soft, uniform(-0.15, 0.4))
    mixed = mixed * uniform(0.96, 1.04) + uniform(-6.0, 6.0)
    noise = torch.randn(frames.shape, generator=generator) * uniform(0.0, 5.0)
    return (mixed + noise).clamp_(0, 255)
