"""Answer losses against loops in float64."""

import math

import pytest
import torch

from v2l_fast.training.loss import answer_cross_entropy, answer_kl, example_means


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 5, generator=generator)
    teacher = torch.randn(9, 5, generator=generator)
    targets = torch.randint(5, (9,), generator=generator)
    owner = torch.tensor([0, 0, 0, 0, 2, 2, 2, 3, 3])
    return logits, teacher, targets, owner


def probabilities(row: torch.Tensor, temperature: float = 1.0) -> list[float]:
    weights = [math.exp(x / temperature) for x in row.tolist()]
    return [w / sum(weights) for w in weights]


def test_cross_entropy_is_a_mean_per_example(tokens):
    logits, _, targets, owner = tokens
    found = answer_cross_entropy(logits, targets, owner, 4)
    for example in range(4):
        own = [i for i in range(9) if owner[i] == example]
        each = [-math.log(probabilities(logits[i])[targets[i]]) for i in own]
        assert found[example].item() == pytest.approx(sum(each) / len(each) if each else 0.0)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_scales_with_the_squared_temperature(tokens, temperature):
    logits, teacher, _, owner = tokens
    found = answer_kl(logits, teacher, owner, 4, temperature)
    for example in range(4):
        own = [i for i in range(9) if owner[i] == example]
        each = []
        for i in own:
            p, q = probabilities(teacher[i], temperature), probabilities(logits[i], temperature)
            each.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        expected = temperature**2 * sum(each) / len(each) if each else 0.0
        assert found[example].item() == pytest.approx(expected, rel=1e-5)


def test_kl_to_itself_is_zero(tokens):
    logits, _, _, owner = tokens
    assert answer_kl(logits, logits, owner, 4).abs().max() < 1e-6


def test_gradient_reaches_every_token(tokens):
    logits, _, targets, owner = tokens
    logits.requires_grad_()
    answer_cross_entropy(logits, targets, owner, 4).mean().backward()
    assert (logits.grad.abs().sum(-1) > 0).all()
    assert example_means(torch.ones(9), owner, 4).tolist() == [1, 0, 1, 1]
