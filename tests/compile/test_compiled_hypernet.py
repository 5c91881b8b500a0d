"""A hypernetwork layer compiles to one graph for every length and every layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests import tiny
from tests.compile.graphs import LENGTHS, assert_one_graph, ramp
from v2l_fast.hypernet.network import HyperNetwork

BATCH, SIZE = 2, tiny.CONFIG.hidden_size


@pytest.fixture(scope="module")
def hypernet() -> HyperNetwork:
    """Of one block: further ones are compiled as the first."""
    return tiny.hypernetwork(replace(tiny.CONFIG, num_blocks=1))


def mask(length: int) -> torch.Tensor:
    """The first example is half as long as the second."""
    return (torch.arange(length) < torch.tensor([[length // 2], [length]])).long()


@pytest.mark.parametrize(
    ("dtype", "masked", "dynamic"),
    [
        (torch.float32, True, None),
        (torch.float32, False, True),
        (torch.bfloat16, True, True),
    ],
    ids=["fp32", "fp32-unmasked", "bf16"],
)
def test_inference(hypernet, dtype, masked, dynamic):
    cases = [(1, ramp(BATCH, s, SIZE, dtype=dtype), mask(s) if masked else None) for s in LENGTHS]
    once = 1 if dynamic else 2
    assert_one_graph(hypernet.layer, cases, dynamic=dynamic, compilations=once)


def test_gradients_in_half_precision(hypernet):
    cases = [(1, ramp(BATCH, s, SIZE, dtype=torch.bfloat16), mask(s)) for s in LENGTHS]
    assert_one_graph(hypernet.layer, cases, list(hypernet.parameters()))


@pytest.mark.parametrize(
    ("shared_head", "recorded"), [(False, True), (True, False)], ids=["gradients", "shared-head"]
)
def test_more_layers_than_the_compiler_keeps_graphs(shared_head, recorded):
    layers = 10  # the compiler keeps 8 graphs by default
    hypernet = tiny.hypernetwork(
        replace(tiny.CONFIG, num_layers=layers, num_blocks=1, shared_head=shared_head)
    )
    lengths = [LENGTHS[layer % len(LENGTHS)] for layer in range(layers)]
    cases = [(layer, ramp(BATCH, s, SIZE), mask(s)) for layer, s in enumerate(lengths)]
    assert_one_graph(hypernet.layer, cases, list(hypernet.parameters()) if recorded else [])
