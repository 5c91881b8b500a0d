"""Learning-rate schedules and the optimizer's groups."""

import math

import pytest

from tests import tiny
from v2l_fast.training.config import OptimConfig
from v2l_fast.training.optim import cosine, make_optimizer, rate_factor, set_rate, trapezoid


def test_trapezoid_rises_stays_and_falls():
    values = [trapezoid(step, 100, 10, 0.4) for step in range(101)]
    assert values[0] == 0.1 and values[9] == 1.0
    assert all(v == 1.0 for v in values[9:61])
    assert values[80] == 0.5 and values[100] == 0.0
    assert values[60:] == sorted(values[60:], reverse=True)


def test_cosine_rises_and_falls():
    values = [cosine(step, 110, 10) for step in range(110)]
    assert values[0] == 0.1 and values[9] == values[10] == 1.0
    assert values[60] == pytest.approx(0.5)
    assert values[109] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))
    assert values[10:] == sorted(values[10:], reverse=True)
    assert cosine(0, 10, 0) == 1.0 and cosine(10, 10, 0, floor=0.1) == pytest.approx(0.1)


def test_warmup_is_a_share_of_the_steps_or_a_number():
    assert rate_factor(OptimConfig(steps=1000, warmup_ratio=0.03), 14) == 0.5
    assert rate_factor(OptimConfig(steps=1000, warmup_steps=100), 49) == 0.5
    assert rate_factor(OptimConfig(steps=100, schedule="trapezoid", decay_ratio=0.5), 75) == 0.5


def test_scalers_have_their_own_rate_and_decay():
    network = tiny.hypernetwork()
    config = OptimConfig(
        lr=2e-3, scaler_lr_factor=5.0, scaler_weight_decay=0.0, weight_decay=0.01, warmup_steps=4
    )
    optimizer = make_optimizer(network, config)
    assert set_rate(optimizer, config, 1) == 1e-3
    others, scalers = optimizer.param_groups
    assert (others["lr"], others["weight_decay"]) == (1e-3, 0.01)
    assert (scalers["lr"], scalers["weight_decay"]) == (5e-3, 0.0)
    assert len(scalers["params"]) == 2
    assert len(others["params"]) + 2 == len(list(network.parameters()))
