"""Features to loss compile to one graph, forward and backward, for every context and answer."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests import tiny
from tests.compile.graphs import LENGTHS, assert_one_graph, ramp
from tests.compile.models import SIZE, decoder
from v2l_fast.training.loss import answer_cross_entropy
from v2l_fast.training.step import answer_logits, generate_adapters
from v2l_fast.training.turns import PackedTurns, pack_turns

VIDEOS, LAYERS, QUESTIONS = 2, 2, 3


def packed(length: int) -> PackedTurns:
    """Two rows, of two questions and of one; prefixes, questions and answers grow with length."""

    def ids(count: int, start: int) -> list[int]:
        return [10 + (start + i) % 20 for i in range(count)]

    prefixes = [ids(length // 2, 0), ids(length // 2 + 1, 3)]
    turns = [
        [(ids(3, 5), ids(length // 3, 1)), (ids(2, 8), ids(3, 2))],
        [(ids(2, 9), ids(4, 7))],
    ]
    return pack_turns(prefixes, turns, pad_id=0)


def test_forward_and_backward():
    hypernet = tiny.hypernetwork(replace(tiny.CONFIG, num_layers=LAYERS, num_blocks=1))
    frozen = decoder(LAYERS)

    def loss(features, mask, turns, index):
        adapters = generate_adapters(hypernet, features, mask, recompute=False)
        logits = answer_logits(frozen, turns, adapters, index)
        return answer_cross_entropy(logits, turns.targets, turns.turns, QUESTIONS).mean()

    cases = []
    for length in LENGTHS:
        features = ramp(VIDEOS, LAYERS, length, SIZE)
        mask = (torch.arange(length) < torch.tensor([[length], [length // 2]])).long()
        cases.append((features, mask, packed(length), torch.tensor([1, 0])))
    assert_one_graph(loss, cases, list(hypernet.parameters()))
