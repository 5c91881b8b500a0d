"""The optimizer, and learning-rate schedules as plain functions of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from v2l_fast.training.config import OptimConfig


def trapezoid(step: int, steps: int, warmup: int, decay_ratio: float, floor: float = 0.0) -> float:
    """Factor of the learning rate at 0-based `step`: linear warm-up, flat, linear to `floor`.

    The decay takes the last `decay_ratio` of the `steps`.
    """
    decay = max(1, round(steps * decay_ratio))
    left = max(0.0, (steps - step) / decay)
    return min(1.0, (step + 1) / max(1, warmup), floor + (1 - floor) * left)


def cosine(step: int, steps: int, warmup: int, floor: float = 0.0) -> float:
    """Factor at 0-based `step`: linear warm-up, then half a cosine to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def rate_factor(config: OptimConfig, step: int) -> float:
    """The configured schedule's factor at 0-based `step`."""
    warmup = config.warmup_steps or round(config.warmup_ratio * config.steps)
    if config.schedule == "cosine":
        return cosine(step, config.steps, warmup, config.final_lr_ratio)
    return trapezoid(step, config.steps, warmup, config.decay_ratio, config.final_lr_ratio)


def make_optimizer(hypernet: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with two parameter groups: the scalers (scaler_A.*, scaler_B.*), and the rest.

    Each group's "factor" multiplies the scheduled learning rate. Fused on a GPU.
    """
    named = {name: p for name, p in hypernet.named_parameters() if p.requires_grad}
    scalers = [p for name, p in named.items() if name.startswith("scaler_")]
    others = [p for name, p in named.items() if not name.startswith("scaler_")]
    return torch.optim.AdamW(
        [
            {"params": others, "factor": 1.0, "weight_decay": config.weight_decay},
            {
                "params": scalers,
                "factor": config.scaler_lr_factor,
                "weight_decay": config.scaler_weight_decay,
            },
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=others[0].is_cuda,
    )


def set_rate(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int) -> float:
    """Set every group's learning rate for 0-based `step`; returns it without the factor."""
    rate = config.lr * rate_factor(config, step)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    return rate
