"""A training step with compiled layers equals eager, without a new graph for a new length."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests import tiny
from tests.compile.graphs import assert_same
from tests.training import plain
from v2l_fast.data.readers import Sample
from v2l_fast.pipeline import visual_features
from v2l_fast.training.step import TrainStep


def samples(backbone, frames: int) -> list[Sample]:
    """Two videos of as many frames, encoded: vision is compiled in a test of its own."""
    actual = []
    for seed in range(2):
        one = plain.sample(backbone, seed, (frames,), 2)
        (features,) = visual_features(backbone, one.chunks)
        chunk = replace(one.chunks[0], pixels=None, features=features)
        actual.append(replace(one, chunks=(chunk,)))
    return actual


@pytest.mark.slow
def test_recomputed_forward_and_backward():
    config = replace(tiny.CONFIG, num_blocks=1, chunk_position=True)
    network, backbone = tiny.hypernetwork(config), tiny.backbone()
    parameters = list(network.parameters())
    step = TrainStep(network, backbone)

    def run(given: list[Sample]) -> list[torch.Tensor]:
        loss = step(given).loss
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    cases = [samples(backbone, frames) for frames in (3, 7, 5)]
    expected = [run(case) for case in cases]
    torch._dynamo.reset()
    backbone.decoder.compile("aot_eager")
    network.compile_layers("aot_eager")
    for number, case in enumerate(cases):
        with torch._dynamo.config.patch(error_on_recompile=number >= 1):
            assert_same(run(case), expected[number])
