"""Means per example and the KL divergence, against loops in float64."""

import math

import pytest
import torch

from v2l_fast.training.losses import example_means, token_kl


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 9, 5, generator=generator)


def probabilities(row: torch.Tensor, temperature: float) -> list[float]:
    weights = [math.exp(x / temperature) for x in row.tolist()]
    return [w / sum(weights) for w in weights]


def test_means_are_per_example():
    values = torch.arange(9.0)
    owner = torch.tensor([0, 0, 0, 0, 2, 2, 2, 3, 3])
    assert example_means(values, owner, 5).tolist() == [1.5, 0.0, 5.0, 7.5, 0.0]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_scales_with_the_squared_temperature(logits, temperature):
    actual = token_kl(*logits, temperature)
    for token, (student, teacher) in enumerate(logits.unbind(1)):
        p, q = probabilities(teacher, temperature), probabilities(student, temperature)
        expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert actual[token].item() == pytest.approx(temperature**2 * expected, rel=1e-5)


def test_kl_to_itself_is_zero(logits):
    assert token_kl(logits[0], logits[0]).abs().max() < 1e-6
