"""Learning-rate schedules as plain functions of the step."""

from __future__ import annotations


def trapezoid(step: int, steps: int, warmup: int, decay_share: float) -> float:
    """Multiplier of the learning rate at 0-based `step`: linear warm-up, flat, linear to 0.

    The decay takes the last `decay_share` of the `steps`.
    """
    decay = max(1, round(steps * decay_share))
    return min(1.0, (step + 1) / max(1, warmup), max(0.0, (steps - step) / decay))
