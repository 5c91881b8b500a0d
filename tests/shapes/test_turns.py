"""Packed turns compute what single turns compute."""

import torch

from v2l_fast.backbones.decoder import Span
from v2l_fast.shapes.scene import sample_scenes
from v2l_fast.shapes.train_language import answer_logits, cache_visual_tokens
from v2l_fast.shapes.turns import pack_turns


def packed_case(base, prompts):
    scenes = sample_scenes("train", 2, 0)
    visual = cache_visual_tokens(base.model, scenes, None)
    prefixes = [prompts.video_prefix, prompts.text_prefix]
    turns = [
        [(prompts.question(q), prompts.answer(a)) for q, a in row]
        for row in (
            [("What happens?", "a small red bar moves up"), ("What color is the bar?", "red")],
            [("How many objects are there?", "two"), ("What happens?", "yes"), ("Yes?", "no")],
        )
    ]
    return prefixes, turns, visual


@torch.no_grad()
def test_packed_turns_equal_single_turns(base, prompts):
    prefixes, turns, visual = packed_case(base, prompts)
    pad = prompts.tokenizer.pad_token_id
    packed = pack_turns(prefixes, turns, pad)
    together = answer_logits(base.model, packed, visual[0].flatten(0, 1))
    parts = []
    for prefix, row in zip(prefixes, turns, strict=True):
        for turn in row:
            shown = visual[0] if prefix is prompts.video_prefix else visual[0, :0]
            single = pack_turns([prefix], [[turn]], pad)
            parts.append(answer_logits(base.model, single, shown.flatten(0, 1)))
    assert torch.allclose(together, torch.cat(parts), atol=1e-4)
    assert packed.targets.tolist() == [i for row in turns for _, answer in row for i in answer]
    assert packed.turns.unique_consecutive().tolist() == [0, 1, 2, 3, 4]


@torch.no_grad()
def test_the_backbones_decoder_agrees_with_transformers(base, prompts):
    _, turns, visual = packed_case(base, prompts)
    packed = pack_turns([prompts.text_prefix] * 2, turns, prompts.tokenizer.pad_token_id)
    expected = answer_logits(base.model, packed, visual[0, :0].flatten(0, 1))
    embeds = base.decoder.embed(packed.ids)
    rope = base.decoder.text_model.rotary_emb(embeds, packed.positions)
    hidden = base.decoder.forward(embeds, Span(packed.positions, packed.mask, rope))
    found = base.decoder.logits(hidden[packed.rows, packed.columns])
    assert torch.allclose(found, expected, atol=1e-4)
