"""FrameFusion: what is merged, what is pruned, what survives."""

from __future__ import annotations

import math

import pytest
import torch

from tests import tiny
from v2l_fast.errors import ConfigError
from v2l_fast.evaluation.methods import (
    FrameFusion,
    Reduction,
    continue_greedily,
    reduced_layers,
    reduced_prefix,
)
from v2l_fast.generation import SamplingParams, generate
from v2l_fast.video import Clip
from v2l_fast.vlm import Prompt


@pytest.fixture(scope="module")
def prompt(backbone) -> Prompt:
    """Six frames of four visual tokens, all different."""
    return backbone.video_prefix(backbone.encode(tiny.clip(6, 3), 32))


def repeated(backbone, frames: int) -> Prompt:
    """The same frame over and over."""
    one = tiny.clip(1, 0).frames
    clip = Clip.from_frames(one.repeat(frames, 1, 1, 1), fps=1.0)
    return backbone.video_prefix(backbone.encode(clip, 32))


def lengths(backbone, prompt, frames, settings, reduction=None) -> list[int]:
    layers = reduced_layers(backbone.decoder, prompt, frames, settings, reduction=reduction)
    return [hidden.shape[1] for hidden in layers]


@torch.no_grad()
def test_keeping_all_is_the_plain_decoder(backbone, prompt):
    """Even where tokens are alike enough to merge."""
    for case in (prompt, repeated(backbone, 6)):
        result = list(reduced_layers(backbone.decoder, case, 6, FrameFusion(keep=1.0)))
        expected = list(backbone.decoder.layer_inputs(case.embeddings[None]))
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_equal_frames_merge_before_the_first_layer(backbone):
    """Six equal frames of four tokens become one frame of four, their mean, at its place."""
    prompt = repeated(backbone, 6)
    settings = FrameFusion(keep=1 / 6, similarity=0.99)
    first = next(iter(reduced_layers(backbone.decoder, prompt, 6, settings)))[0]
    visual = prompt.visual.nonzero()[:, 0]
    survivors = [i for i in range(len(prompt)) if i not in set(visual[4:].tolist())]
    assert torch.allclose(first, prompt.embeddings[survivors], atol=1e-5)


def test_a_merged_token_is_the_mean_of_its_run(backbone):
    prompt = repeated(backbone, 3)
    visual = prompt.visual.nonzero()[:, 0]
    changed = prompt.embeddings.clone()
    # The second frame's first token is scaled: as similar as before, but not the same.
    changed[visual[4]] *= 3
    case = Prompt(changed, prompt.visual_tokens, prompt.visual)
    settings = FrameFusion(keep=1 / 3, similarity=0.99)
    first = next(iter(reduced_layers(backbone.decoder, case, 3, settings)))[0]
    expected = (changed[visual[0]] * 2 + changed[visual[4]]) / 3
    assert torch.allclose(first[visual[0]], expected, rtol=1e-5, atol=1e-5)


def test_the_budget_limits_merging_to_the_most_similar(backbone):
    prompt = repeated(backbone, 6)
    settings = FrameFusion(keep=0.5, similarity=0.9)
    assert lengths(backbone, prompt, 6, settings) == [len(prompt) - 12] * 3


@torch.no_grad()
def last_attention(decoder, index, hidden, span) -> torch.Tensor:
    """Mean over heads of what the last token attends to, written out."""
    layer = decoder.text_model.layers[index]
    query, key, _ = decoder.project_qkv(layer, index, hidden, span)
    key = key.repeat_interleave(2, 1)
    scores = query @ key.mT * layer.self_attn.scaling
    ahead = torch.ones(hidden.shape[1], hidden.shape[1]).triu(1).bool()
    weights = scores.masked_fill(ahead, -math.inf).softmax(-1)
    return weights[0, :, -1].mean(0)


@torch.no_grad()
def test_different_frames_are_pruned_by_the_last_tokens_attention(backbone, prompt):
    """Nothing merges, so the tokens that the last one attends to least go between the first
    layer's attention, which decides, and its MLP, in one step."""
    settings = FrameFusion(keep=0.25, similarity=2.0)
    decoder, reduction = backbone.decoder, Reduction()
    result = list(reduced_layers(decoder, prompt, 6, settings, reduction=reduction))
    assert [h.shape[1] for h in result] == [len(prompt), len(prompt) - 18, len(prompt) - 18]
    assert reduction == Reduction(merged=0, pruned=18)
    span = decoder.prefill_metadata(1, len(prompt))
    received = last_attention(decoder, 0, result[0], span)
    layer = decoder.text_model.layers[0]
    attended = result[0] + decoder.attention_block(layer, 0, result[0], span)
    visual = prompt.visual.nonzero()[:, 0]
    best = visual[received[visual].topk(6).indices]
    kept = sorted([*best.tolist(), *(~prompt.visual).nonzero()[:, 0].tolist()])
    survivors = attended[:, kept]
    expected = survivors + decoder.mlp_block(layer, 0, survivors)
    assert torch.allclose(result[1], expected, atol=1e-6)


@torch.no_grad()
def test_layers_merge_between_attention_and_mlp(backbone, prompt):
    """Frames that differ before the first layer and are alike behind its attention: an attention
    whose output drowns what differs makes them so."""
    decoder = backbone.decoder
    similarity = 0.9
    settings = FrameFusion(keep=1 / 6, similarity=similarity, stop_ratio=0.0)
    visual = prompt.visual.nonzero()[:, 0]
    shift = torch.zeros(prompt.embeddings.shape[1])
    shift[0] = 100.0
    real, calls = decoder.attention_block, []

    def drowning(layer, index, hidden, span, cache=None, adapters=None):
        calls.append(hidden.shape[1])
        return real(layer, index, hidden, span, cache, adapters) + shift

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "attention_block", drowning)
        reduction = Reduction()
        result = lengths(backbone, prompt, 6, settings, reduction)
    assert result == [len(prompt), len(prompt) - 20, len(prompt) - 20]
    # Layer 0's attention saw all tokens.
    assert calls[0] == len(prompt) and len(visual) == 24
    assert reduction == Reduction(merged=20, pruned=0)


def test_merging_goes_on_until_few_merge(backbone, prompt):
    """With no least share, every layer may merge and none prunes."""
    settings = FrameFusion(keep=0.25, similarity=2.0, stop_ratio=0.0)
    assert lengths(backbone, prompt, 6, settings) == [len(prompt)] * 3


def test_text_is_never_touched_and_answers_follow(backbone, prompt):
    settings = FrameFusion(keep=0.01)
    prefix, _ = reduced_prefix(backbone.decoder, prompt, 6, settings, room=64)
    text = len(prompt) - prompt.visual_tokens
    assert all(text < length <= len(prompt) for length in prefix.lengths)
    assert prefix.lengths[-1] == text + 1 and prefix.position == len(prompt)
    rest = backbone.question_suffix("what happens?").embeddings
    result = continue_greedily(backbone.decoder, prefix, rest, backbone.stop_ids, 8)
    assert len(result.tokens[0]) == 8


@torch.no_grad()
def test_survivors_keep_their_positions(backbone, prompt):
    """A reduced prefix answers as a decoder would that hides what was pruned from later layers."""
    decoder = backbone.decoder
    settings = FrameFusion(keep=0.25, similarity=2.0)
    prefix, _ = reduced_prefix(decoder, prompt, 6, settings, room=64)
    # Layer 0 attends to all: it is the attention that decides.
    assert prefix.lengths == (len(prompt), len(prompt) - 18, len(prompt) - 18)
    rest = backbone.question_suffix("what happens?").embeddings
    result = continue_greedily(decoder, prefix, rest, backbone.stop_ids, 1)
    received = last_attention(
        decoder, 0, prompt.embeddings[None], decoder.prefill_metadata(1, len(prompt))
    )
    visual = prompt.visual.nonzero()[:, 0]
    dropped = visual[received[visual].topk(18, largest=False).indices]
    whole = torch.cat([prompt.embeddings, rest])[None]
    causal = torch.ones(whole.shape[1], whole.shape[1], dtype=torch.bool).tril()
    masked = causal.clone()
    masked[:, dropped] = False
    # A dropped token still needs something to see.
    masked[dropped, dropped] = True
    positions = torch.arange(whole.shape[1])[None]
    hidden = decoder.layer(0, whole, decoder.attention_metadata(positions, causal[None, None]))
    for index in (1, 2):
        hidden = decoder.layer(
            index, hidden, decoder.attention_metadata(positions, masked[None, None])
        )
    expected = decoder.logits(decoder.text_model.norm(hidden[0, -1])).argmax().item()
    assert result.tokens == [[expected]]


@torch.no_grad()
def test_the_last_hidden_state_gives_the_first_token(backbone, prompt):
    decoder = backbone.decoder
    _, last = reduced_prefix(decoder, prompt, 6, FrameFusion(keep=1.0), room=1)
    assert torch.allclose(
        decoder.text_model.norm(last), decoder.forward(prompt.embeddings[None])[:, -1], atol=1e-5
    )


def test_a_single_frame_is_only_pruned(backbone):
    prompt = backbone.video_prefix(backbone.encode(tiny.clip(1, 0), 32))
    result = lengths(backbone, prompt, 1, FrameFusion(keep=0.5))
    assert result == [len(prompt), len(prompt) - 2, len(prompt) - 2]


def test_plain_generation_agrees_with_the_prefix(backbone, prompt):
    rest = backbone.question_suffix("which color is it?").embeddings
    whole = torch.cat([prompt.embeddings, rest])
    limit = SamplingParams(max_new_tokens=8)
    expected = generate(backbone.decoder, [whole], backbone.stop_ids, limit).tokens
    prefix, _ = reduced_prefix(backbone.decoder, prompt, 6, FrameFusion(keep=1.0), room=64)
    result = continue_greedily(backbone.decoder, prefix, rest, backbone.stop_ids, 8)
    assert result.tokens == expected


@pytest.mark.parametrize("keep", [0.0, -1.0, 1.5])
def test_impossible_shares(keep):
    with pytest.raises(ConfigError, match="keep"):
        FrameFusion(keep=keep)


def test_frames_that_do_not_fit(backbone, prompt):
    with pytest.raises(ConfigError, match="frames of equal size"):
        lengths(backbone, prompt, 5, FrameFusion())
    with pytest.raises(ConfigError, match="frames of equal size"):
        lengths(backbone, backbone.question("what happens?"), 1, FrameFusion())
