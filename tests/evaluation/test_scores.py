"""Eqs. 10 and 11 against transformers' forward on written-in weights."""

from __future__ import annotations

import pytest
import torch

from tests.evaluation.plain import log_probability, with_update
from v2l_fast.errors import ConfigError
from v2l_fast.evaluation.ablations import diagnostic_scores, log_probabilities

PROMPT = "what happens?"
CANDIDATES = ("red circle moves left then right", "blue", "a large square stays after the circle")


def test_length_normalized_log_probability(model, adapters):
    found = log_probabilities(model, PROMPT, CANDIDATES, [adapters[0], None, adapters[1]])
    assert found.shape == (3, 3) and found.dtype == torch.float64
    plain = [
        with_update(model.backbone, adapters[0]), model.backbone.model,
        with_update(model.backbone, adapters[1]),
    ]  # fmt: skip
    for row, weights in zip(found, plain, strict=True):
        for value, text in zip(row, CANDIDATES, strict=True):
            expected = log_probability(model.backbone, weights, PROMPT, text)
            assert value.item() == pytest.approx(expected, rel=2e-5)


def test_score_is_that_of_the_best_reference(model, adapters):
    table = log_probabilities(model, PROMPT, CANDIDATES, adapters)
    found = diagnostic_scores(model, PROMPT, CANDIDATES, adapters)
    assert torch.equal(found, table.max(1).values)
    assert len({tuple(row) for row in table.tolist()}) == 3


def test_more_rows_than_a_batch(model, adapters):
    """Batches do not see each other."""
    together = log_probabilities(model, PROMPT, CANDIDATES, [*adapters, None] * 2)
    alone = [log_probabilities(model, PROMPT, [c], [adapters[1]]).item() for c in CANDIDATES]
    assert together[1].tolist() == pytest.approx(alone, rel=1e-5)
    assert torch.equal(together[:4], together[4:]) or torch.allclose(together[:4], together[4:])


def test_a_reference_without_tokens(model):
    with pytest.raises(ConfigError, match="has no tokens"):
        log_probabilities(model, PROMPT, ["   "], [None])
