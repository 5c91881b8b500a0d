"""Chunk composition: one bias, ranks side by side, scores beside the single adapter's."""

from __future__ import annotations

import pytest
import torch

from v2l_fast.errors import ConfigError
from v2l_fast.evaluation.ablations import compare_chunks
from v2l_fast.evaluation.examples import EvalExample
from v2l_fast.evaluation.metrics import token_f1
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.video.clip import split_clip


def test_rows(model, clips):
    clip = clips[0]
    examples = [
        EvalExample(clip, "what happens?", ("red circle moves",), "caption"),
        EvalExample(clip, "which color?", ("red",), "qa"),
    ]
    found = compare_chunks(model, examples, token_f1, (3,), max_new_tokens=6)
    assert [row["chunks"] for row in found["rows"]] == [1, 3]
    assert [row["rank"] for row in found["rows"]] == [4, 12]
    assert found["chunk_position"] is False and found["examples"] == 2
    single, composed = found["rows"]
    parts = [model.internalize(part) for part in split_clip(clip, 3)]
    adapter = Adapter.compose(parts)
    a, _ = adapter.merged()
    assert a["down_proj"].shape[1] == 3 * 4 + 4
    assert torch.equal(a["down_proj"][:, 12:], adapter.bias.A["down_proj"])
    for example in examples:
        said = model.ask(example.prompt, adapter, max_new_tokens=6)
        score = example.score(said, token_f1)
        assert composed["score"][example.kind]["estimate"] == pytest.approx(score)
        before = single["score"][example.kind]["estimate"]
        none = found["controls"]["no adapter"][example.kind]["estimate"]
        assert composed["change"][example.kind]["estimate"] == pytest.approx(score - before)
        assert (example.kind in single["kept"]) == (before > none)
        if before > none:
            kept = (score - none) / (before - none)
            assert composed["kept"][example.kind] == pytest.approx(kept)
            assert single["kept"][example.kind] == 1


def test_kept_is_what_lies_above_the_score_without_an_adapter(model, clips):
    """A metric that gives every answer half a point: nothing is kept of nothing."""
    examples = [EvalExample(clips[0], "what happens?", ("red",))]
    found = compare_chunks(model, examples, lambda answer, reference: 0.5, (2,), max_new_tokens=2)
    assert all(row["kept"] == {} for row in found["rows"])


def test_no_chunk(model, examples):
    with pytest.raises(ConfigError, match="at least 1"):
        compare_chunks(model, examples, token_f1, (0, 2))
