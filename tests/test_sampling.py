"""Sampling: the right distribution for every valid parameter, in any batch."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from v2l_fast.errors import ConfigError
from v2l_fast.generation.sampling import (
    MAX_SEED,
    MIN_SEED,
    SamplingParams,
    SamplingTensors,
    sample,
    uniform,
)

CPU = torch.device("cpu")
SMALL = torch.tensor([2.0, 0.5, 1.0, -1.0, 0.0, 1.5, -3.0, 0.9, 0.2, 1.1])


def draw(logits, sampling: list[SamplingParams], index: int = 0) -> list[int]:
    """A token for each of the rows of ``logits`` [E, V]."""
    parameters = SamplingTensors.of(sampling, logits.shape[1], CPU)
    return sample(logits, parameters, torch.full((len(sampling),), index)).tolist()


def draws(logits, count: int, index: int = 0, first: int = 0, **options) -> torch.Tensor:
    """How often each token is sampled with the seeds ``first`` to ``first + count - 1``."""
    options.setdefault("temperature", 1.0)
    sampling = [SamplingParams(seed=first + i, **options) for i in range(count)]
    tokens = draw(logits.expand(count, -1), sampling, index)
    return torch.bincount(torch.tensor(tokens), minlength=len(logits))


def plain(logits, temperature=1.0, top_p=1.0, top_k=0) -> torch.Tensor:
    """The distribution by definition: sort, keep a prefix, renormalize."""
    probs = ((logits.double() - logits.double().max()) / temperature).softmax(-1)
    order = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))
    kept, before = [], 0.0
    for token in order:
        if kept and (before >= top_p or (top_k and len(kept) >= top_k)):
            break
        kept.append(token)
        before += float(probs[token])
    result = torch.zeros_like(probs)
    result[kept] = probs[kept]
    return result / result.sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 3},
        {"top_p": 0.6},
        {"top_p": 0.9, "top_k": 4, "temperature": 1.7},
        {"temperature": 1e30},
        {"temperature": 1e308},
    ],
)
@pytest.mark.parametrize("index", [0, 7])
def test_frequencies_follow_the_distribution(options, index):
    expected = plain(SMALL, **options)
    counts = draws(SMALL, 4000, index, **options)
    assert counts[expected == 0].sum() == 0
    support = expected > 0
    test = stats.chisquare(counts[support].numpy(), (expected[support] * 4000).numpy())
    assert test.pvalue > 1e-4


def test_tokens_of_one_seed_are_independent():
    """Over the index, too, and from each index to the next."""
    index = torch.arange(20000)
    for seed in (0, 1, MIN_SEED, MAX_SEED):
        u = uniform(torch.full_like(index, seed), index)
        assert 0 <= u.min() and u.max() < 1
        assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-4
        assert abs(float(torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1])) < 0.03
    many = uniform(index, torch.zeros_like(index))
    assert stats.kstest(many.numpy(), "uniform").pvalue > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_supports_at_full_vocabulary_with_ties(dtype):
    """Half-precision logits tie often; exactly a prefix by (probability, id) is kept."""
    vocabulary = 49280
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(1, vocabulary, generator=generator) * 2).to(dtype).float()
    logits[0, 100] = -0.0
    logits[0, 99] = 0.0
    for options in ({"top_k": 37}, {"top_p": 0.3}, {"top_p": 0.999, "top_k": 20000}, {"top_k": 1}):
        expected = plain(logits[0], 0.9, **options)
        counts = draws(logits[0], 64, temperature=0.9, **options)
        assert counts[expected == 0].sum() == 0
        top = int(logits.argmax())
        assert options != {"top_k": 1} or counts[top] == 64
    # The whole support of a small one is reached.
    assert (draws(logits[0], 400, temperature=50.0, top_k=3) > 0).sum() == 3


def test_ties_at_the_border_go_by_id():
    logits = torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0, 1.0])
    assert (draws(logits, 300, top_k=4) > 0).tolist() == [True, True, True, True, False, False]
    assert (draws(logits, 300, top_k=1) > 0).tolist() == [False, True, False, False, False, False]
    half = plain(logits)[[1, 3, 0]].sum().item() - 1e-4
    counts = draws(logits, 400, top_p=half)
    assert (counts > 0).tolist() == [True, True, False, True, False, False]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 5e-324},
        {"temperature": 1e-320},
        {"temperature": 1e-45},
        {"temperature": 1e-40},
        {"temperature": 1e-38},
        {"temperature": 1e-20},
        {"top_p": 5e-324},
        {"top_p": 1e-300},
        {"top_p": 1e-40},
        {"top_k": 1},
        {"temperature": 1e308, "top_k": 1},
        {"temperature": 1e308, "top_p": 1e-300},
    ],
)
def test_the_narrowest_truncation_is_greedy(options):
    for scale in (1.0, 1e-3, 1e6, 1e30):
        assert draws(SMALL * scale, 50, **options)[0] == 50


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 10**30},
        {"top_k": (1 << 63) - 1},
        {"top_k": 11},
        {"top_p": 1.0 - 2**-53},
        {"temperature": 1},
    ],
)
def test_the_widest_truncation_changes_nothing(options):
    assert torch.equal(draws(SMALL, 500, **options), draws(SMALL, 500))


def test_masked_tokens_are_never_sampled():
    logits = torch.where(torch.arange(10) % 2 == 0, SMALL, -math.inf)
    for temperature in (1e-40, 1.0, 1e30, 1e308):
        assert draws(logits, 200, temperature=temperature)[1::2].sum() == 0


def test_a_row_does_not_depend_on_the_batch():
    """Bit for bit: alone, at any index, and beside rows with other parameters."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(13, 5000, generator=generator) * 3
    sampling = [
        SamplingParams(
            temperature=(1e-40, 0.7, 1.0, 2.5, 1e30)[i % 5],
            top_p=(1.0, 0.9, 1e-300)[i % 3],
            top_k=(0, 5, 10**9, 1)[i % 4],
            seed=(MIN_SEED, -1, 0, 1 << 40, MAX_SEED)[i % 5],
        )
        for i in range(13)
    ]
    together = draw(logits, sampling, 3)
    order = torch.randperm(13, generator=generator).tolist()
    assert draw(logits[order], [sampling[i] for i in order], 3) == [together[i] for i in order]
    for place, one in enumerate(sampling):
        row = logits[place : place + 1]
        assert draw(row, [one], 3) == [together[place]]
        parameters = SamplingTensors.of([one], 5000, CPU)
        actual = sample(
            row, parameters, torch.tensor([3]), by_mass=one.top_p < 1, by_count=one.top_k > 0
        )
        assert actual.tolist() == [together[place]]


def test_rounding_errors_do_not_change_samples():
    """Batches differ in rounding: the answer must not change with the last bits of the logits."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(400, 300, generator=generator)
    sampling = [SamplingParams(temperature=1.0, top_p=0.95, seed=i) for i in range(400)]
    near = logits * (1 + 1e-6 * torch.randn(400, 300, generator=generator))
    pairs = zip(draw(logits, sampling), draw(near, sampling), strict=True)
    assert sum(one != other for one, other in pairs) <= 1


def test_nan_raises_nothing():
    logits = SMALL.repeat(4, 1)
    logits[1, 3], logits[2, 0] = math.nan, math.inf
    logits[3] = -math.inf
    actual = draw(logits, [SamplingParams(temperature=1.0, top_p=0.5, top_k=3)] * 4)
    assert actual[0] == draw(SMALL[None], [SamplingParams(temperature=1.0, top_p=0.5, top_k=3)])[0]
    assert all(0 <= token < 10 for token in actual)


def test_seeds_of_examples_wrap():
    assert SamplingParams(seed=MAX_SEED).for_example(1).seed == MIN_SEED
    assert SamplingParams(seed=MAX_SEED).for_example(0).seed == MAX_SEED
    assert SamplingParams(seed=-1).for_example(3).seed == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": 1 << 63}, "seed must be from -2"),
        ({"seed": -(1 << 63) - 1}, "seed must be from -2"),
        ({"seed": 10**5000}, "seed must be from -2"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"seed": None}, "seed must be an integer"),
        ({"top_k": "3"}, "top_k must be an integer, got '3'"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"temperature": 10**400}, "temperature must be a float"),
        ({"temperature": "hot"}, "temperature must be a float, got 'hot'"),
        ({"temperature": -1e-300}, "temperature must be 0"),
        ({"temperature": math.nan}, "temperature must be"),
        ({"temperature": math.inf}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": math.nan}, "top_p must be above 0"),
        ({"top_p": 1.0000001}, "top_p must be above 0"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be an integer"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"n": 0}, "n must be"),
        ({"logprobs": -1}, "logprobs must be"),
        ({"logprobs": 1.5}, "logprobs must be an integer"),
    ],
)
def test_invalid_values_are_named(wrong, message):
    with pytest.raises(ConfigError, match=message) as refused:
        SamplingParams(**wrong)
    assert len(str(refused.value)) < 200
