"""Identities between the ways of asking, and the arithmetic of their cost."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from v2l_fast.errors import ConfigError
from v2l_fast.evaluation.efficiency import amortized, break_even, compare_methods
from v2l_fast.evaluation.framefusion import FrameFusion
from v2l_fast.evaluation.methods import METHODS, MethodSettings
from v2l_fast.evaluation.metrics import token_f1
from v2l_fast.evaluation.prefix import continue_greedily, prefill

LONG = "what happens after the large circle moves left, and which color is it then?"
QUESTIONS = ("what happens?", LONG, "which color?")
BY_NAME = {method.name: method for method in METHODS}


@pytest.fixture
def setting(model) -> MethodSettings:
    return MethodSettings(
        model, model.config.sampling.override(longest_edge=64), 12, FrameFusion(keep=1.0)
    )


@pytest.fixture(scope="module")
def clip(clips):
    """Tiled at 64 pixels."""
    return clips[0]


@pytest.mark.parametrize(
    "name",
    [
        "vision-feature cache",
        "KV-cache reuse",
        "FrameFusion (ours)",
        "FrameFusion (ours) + KV-cache reuse",
    ],
)
def test_same_tokens_as_direct(setting, clip, name):
    """Caches change nothing, nor does a reduction that keeps all tokens."""
    direct, method = BY_NAME["direct"], BY_NAME[name]
    prepared = method.prepare(setting, clip)
    for question in QUESTIONS:
        expected = direct.ask(setting, direct.prepare(setting, clip), question)
        result = method.ask(setting, prepared, question)
        assert result.tokens == expected.tokens and len(result.tokens) == 12
        text = setting.model.ask_direct(question, clip, longest_edge=64, max_new_tokens=12)
        assert setting.model.backbone.decode(expected.tokens) == text
        assert result.time_to_first_token > 0


def test_a_prompt_is_its_opening_and_its_continuation(backbone, clip):
    video = backbone.encode(clip, 64)
    for question in (*QUESTIONS, "<fake_token_around_image> what?"):
        whole = backbone.video_prompt(video, question)
        opening, rest = backbone.video_prefix(video), backbone.question_suffix(question)
        assert torch.equal(torch.cat([opening.embeddings, rest.embeddings]), whole.embeddings)
        assert opening.visual_tokens == whole.visual_tokens == int(opening.visual.sum())
        assert torch.equal(whole.visual[: len(opening)], opening.visual)


def test_a_cache_is_reused_by_any_number_of_questions(setting, clip):
    """A question leaves nothing behind that the next one sees."""
    method = BY_NAME["KV-cache reuse"]
    prepared = method.prepare(setting, clip)
    first = [method.ask(setting, prepared, question).tokens for question in QUESTIONS]
    again = [method.ask(setting, prepared, question).tokens for question in reversed(QUESTIONS)]
    assert first == again[::-1]


def test_a_cache_without_room(backbone, clip):
    decoder = backbone.decoder
    prefix = prefill(decoder, backbone.video_prefix(backbone.encode(clip, 32)).embeddings, room=8)
    rest = backbone.question_suffix("what happens?").embeddings
    with pytest.raises(ConfigError, match="more room"):
        continue_greedily(decoder, prefix, rest, backbone.stop_ids, 8)


def test_adapter_answers_as_ask_does(setting, clip):
    method = BY_NAME["adapter"]
    prepared = method.prepare(setting, clip)
    adapter = setting.model.internalize(clip, longest_edge=64)
    for question in QUESTIONS:
        tokens = method.ask(setting, prepared, question).tokens
        expected = setting.model.ask(question, adapter, max_new_tokens=12)
        assert setting.model.backbone.decode(tokens) == expected


def test_reducing_nothing_gives_the_same_adapter(setting, clip):
    fused, plain = (
        BY_NAME[name].prepare(setting, clip).stored
        for name in ("FrameFusion (ours) + adapter", "adapter")
    )
    for side in ("A", "B"):
        result, expected = getattr(fused, side)["down_proj"], getattr(plain, side)["down_proj"]
        assert torch.allclose(result, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_merged_adapter_equals_unmerged(setting, clip):
    model, decoder = setting.model, setting.model.backbone.decoder
    frozen = {name: p.clone() for name, p in model.backbone.model.named_parameters()}
    merged = BY_NAME["merged adapter"].prepare(setting, clip).stored
    slots = BY_NAME["adapter"].prepare(setting, clip).stored
    prompt = model.backbone.question(LONG).embeddings[None]
    expected = decoder.logits(decoder.forward(prompt, adapters=slots))
    result = merged.logits(merged.forward(prompt))
    scale = expected.abs().max().item()
    assert torch.allclose(result, expected, rtol=0, atol=1e-4 * scale)
    assert not torch.allclose(result, decoder.logits(decoder.forward(prompt)), atol=1e-2 * scale)
    for name, parameter in model.backbone.model.named_parameters():
        assert torch.equal(parameter, frozen[name])


def test_bytes_stored(setting, clip):
    backbone, config = setting.model.backbone, setting.model.config
    opening = backbone.video_prefix(backbone.encode(clip, 64))
    text = backbone.decoder.config
    expected = {
        "direct": 0,
        "vision-feature cache": opening.visual_tokens * 32 * 4,
        "KV-cache reuse": 2 * 3 * len(opening) * text.num_key_value_heads * 8 * 4,
        "adapter": 3 * config.rank * (48 + 32) * 4,
        "merged adapter": 3 * 48 * 32 * 4,
    }
    for name, size in expected.items():
        assert BY_NAME[name].prepare(setting, clip).bytes == size
    half = dataclasses.replace(setting, fusion=FrameFusion(keep=0.5))
    reduced = BY_NAME["FrameFusion (ours) + KV-cache reuse"].prepare(half, clip).bytes
    assert reduced < expected["KV-cache reuse"]


def test_break_even_is_the_first_number_of_questions_that_costs_less():
    for preparation, query, direct in ((1.0, 0.1, 0.6), (5.0, 0.05, 6.45), (2.0, 0.5, 1.0)):
        n = break_even(preparation, query, direct)
        assert preparation + n * query < n * direct
        assert n == 1 or preparation + (n - 1) * query >= (n - 1) * direct
    assert break_even(1.0, 0.5, 0.5) is None
    assert break_even(0.0, 0.1, 0.5) == 1
    assert amortized(5.0, 0.5, 10) == pytest.approx(1.0)


def test_comparison(setting, examples):
    result = compare_methods(setting, examples, token_f1, repeats=2)
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == [method.name for method in METHODS]
    assert (result["videos"], result["questions"]) == (3, 4)
    assert result["questions_per_video"] == pytest.approx(4 / 3)
    for name in ("direct", "vision-feature cache", "KV-cache reuse", "FrameFusion (ours)"):
        assert rows[name]["same_as_direct"] == 1 and rows[name]["score"] == rows["direct"]["score"]
    assert rows["direct"]["preparation"] == 0 and rows["direct"]["break_even"] is None
    for row in rows.values():
        once = amortized(row["preparation"], row["first_token"], 1)
        assert row["amortized"] == pytest.approx(once)
    reducing = {name for name, row in rows.items() if row["merged"] is not None}
    assert reducing == {name for name in rows if "FrameFusion" in name}
    assert all(rows[name]["merged"] == rows[name]["pruned"] == 0 for name in reducing)
    quarter = dataclasses.replace(setting, fusion=FrameFusion(keep=0.25, similarity=2.0))
    result = compare_methods(quarter, examples[:2], token_f1, repeats=1)
    for row in result["rows"]:
        if "FrameFusion" in row["method"]:
            assert row["merged"] == 0 and row["pruned"] > 0
    without = compare_methods(setting, examples[:1], token_f1, [BY_NAME["adapter"]], repeats=1)
    assert [row["method"] for row in without["rows"]] == ["direct", "adapter"]
