"""Rows of responses: any length, bounded padding; packed rows equal single ones."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.training import plain
from v2l_fast.data.readers import Sample
from v2l_fast.pipeline import Context
from v2l_fast.shapes.train import answer_logits
from v2l_fast.shapes.vlm import cache_visual_tokens
from v2l_fast.shapes.world import sample_scenes
from v2l_fast.training.step import pack_pairs, response_rows

PAD = 99


def sample(prefix: list[int], *turns: tuple[list[int], list[int]]) -> Sample:
    context = Context(torch.zeros(1, dtype=torch.int64), features=torch.zeros(1, 1, 1))
    return Sample("v", (context,), prefix, turns, ("qa",) * len(turns))


SAMPLES = [
    sample([1, 2], ([3], [4, 5]), ([6, 7, 8, 9, 10], [11])),
    sample([1], ([12], [13, 14, 15]), ([16], [])),
]


def test_rows_of_any_length_in_one_group():
    rows = response_rows(SAMPLES, PAD, 1.0, 10**6).to(torch.device("cpu"))
    ((ids, owners),) = rows.groups
    # The shortest first; the last answer token is predicted, never read.
    assert ids.tolist() == [
        [1, 16, PAD, PAD, PAD, PAD, PAD],
        [1, 2, 3, 4, PAD, PAD, PAD],
        [1, 12, 13, 14, PAD, PAD, PAD],
        [1, 2, 6, 7, 8, 9, 10],
    ]
    assert owners.tolist() == [1, 0, 1, 0]
    # In the samples' order: the tokens before 4, 5, 11, 13, 14, 15.
    assert rows.targets.tolist() == [4, 5, 11, 13, 14, 15]
    assert ids.flatten()[rows.positions].tolist() == [3, 4, 10, 12, 13, 14]
    assert rows.pair_index.tolist() == [0, 0, 1, 2, 2, 2]


def test_no_padding_where_none_is_allowed():
    rows = response_rows(SAMPLES, PAD, 0.0, 10**6)
    assert [list(ids.shape) for ids, _ in rows.groups] == [[1, 2], [2, 4], [1, 7]]
    flat = torch.cat([ids.flatten() for ids, _ in rows.groups])
    assert not (flat == PAD).any()
    assert flat[rows.positions].tolist() == [3, 4, 10, 12, 13, 14]


@pytest.mark.parametrize("max_padding", [0.0, 0.1, 0.5])
def test_groups_keep_their_bounds(max_padding):
    samples = plain.batch(tiny.backbone())
    rows = response_rows(samples, PAD, max_padding, 30)
    for ids, owners in rows.groups:
        assert len(owners) == len(ids)
        assert (ids == PAD).sum() <= max_padding * ids.numel()
        assert len(ids) == 1 or ids.numel() <= 30
    assert sum(len(ids) for ids, _ in rows.groups) == sum(len(one.qa_pairs) for one in samples)


TURNS = (
    [("What happens?", "a small red bar moves up"), ("What color is the bar?", "red")],
    [("How many objects are there?", "two"), ("What happens?", "yes"), ("Yes?", "no")],
)


@pytest.fixture
def turns(prompts):
    return [[(prompts.question(q), prompts.answer(a)) for q, a in row] for row in TURNS]


@torch.no_grad()
def test_packed_turns_equal_single_turns(base, prompts, turns):
    visual = cache_visual_tokens(base.model, sample_scenes("train", 1, 0), None)[0]
    prefixes = [prompts.video_prefix, prompts.text_prefix]
    pad = prompts.tokenizer.pad_token_id
    packed = pack_pairs(prefixes, turns, pad)
    together = answer_logits(base.model, packed, visual.flatten(0, 1))
    parts = []
    for prefix, row in zip(prefixes, turns, strict=True):
        for turn in row:
            shown = visual if prefix is prompts.video_prefix else visual[:0]
            single = pack_pairs([prefix], [[turn]], pad)
            parts.append(answer_logits(base.model, single, shown.flatten(0, 1)))
    assert torch.allclose(together, torch.cat(parts), atol=1e-4)
    assert packed.targets.tolist() == [i for row in turns for _, answer in row for i in answer]
    assert packed.pair_index.unique_consecutive().tolist() == [0, 1, 2, 3, 4]


@torch.no_grad()
def test_the_backbones_decoder_agrees_with_transformers(base, prompts, turns):
    packed = pack_pairs([prompts.text_prefix] * 2, turns, prompts.tokenizer.pad_token_id)
    decoder = base.decoder
    span = decoder.attention_metadata(packed.positions, packed.mask)
    hidden = decoder.forward(decoder.embed(packed.ids), span)
    actual = decoder.logits(hidden[packed.rows, packed.columns])
    empty = torch.zeros(0, base.hidden_size)
    assert torch.allclose(actual, answer_logits(base.model, packed, empty), atol=1e-4)


def test_a_token_sees_the_prefix_and_its_own_turn():
    packed = pack_pairs([[1, 2], [1]], [[([3], [4, 5]), ([6], [7])], [([8], [9])]], pad_id=0)
    assert packed.to(torch.device("cpu")).segments.tolist() == [
        [0, 0, 1, 1, 1, 2, 2],
        [0, 1, 1, -1, -1, -1, -1],
    ]
    seen = [[[j for j in range(7) if row[i, j]] for i in range(7)] for row in packed.mask[:, 0]]
    assert seen[0] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 5],
                       [0, 1, 5, 6]]  # fmt: skip
    assert seen[1][:3] == [[0], [0, 1], [0, 1, 2]]
    # Padding sees padding: a row of nothing would be NaN.
    assert seen[1][3:] == [[3], [3, 4], [3, 4, 5], [3, 4, 5, 6]]
    assert packed.positions[0].tolist() == [0, 1, 2, 3, 4, 2, 3]
    assert list(zip(packed.rows.tolist(), packed.columns.tolist(), strict=True)) == [
        (0, 2), (0, 3), (0, 5), (1, 1)
    ]  # fmt: skip
