"""Identities between the ways of asking, and the arithmetic of their cost."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from v2l_fast.errors import ConfigError
from v2l_fast.evaluation import efficiency as module
from v2l_fast.evaluation.efficiency import (
    amortized,
    break_even,
    compare_methods,
    measure_cell,
    sweep,
)
from v2l_fast.evaluation.examples import EvalExample, token_f1
from v2l_fast.evaluation.methods import (
    METHODS,
    FrameFusion,
    MethodSettings,
    continue_greedily,
    prefill,
)
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.shapes.render import write_clip
from v2l_fast.shapes.world import sample_scenes
from v2l_fast.video import FrameSampling

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


# --- sweep ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[EvalExample]:
    """A file of 32 frames with two questions, and one of 12 frames."""
    folder = tmp_path_factory.mktemp("clips")
    first, second = sample_scenes("test", 2, 0)
    long = write_clip(first, folder / "long.mp4", size=48)
    short = write_clip(second, folder / "short.mp4", size=48, seconds=3)
    return [
        EvalExample(long, "what happens?", ("red circle",)),
        EvalExample(short, "what happens?", ("blue square",)),
        EvalExample(long, "which color?", ("red",)),
    ]


def test_frames_asked_for_are_frames_encoded(model, files, monkeypatch):
    seen = []
    answer, answer_direct = type(model).answer, type(model).answer_direct

    def through_adapter(self, question, adapter, **options):
        if isinstance(adapter, Adapter):
            seen.append(len(adapter.provenance["source"]["frame_indices"]))
        return answer(self, question, adapter, **options)

    def direct(self, question, clip, *args, **options):
        (result,) = answer_direct(self, question, clip, *args, **options)
        seen.append(result.visual_tokens / self.backbone.tokens_per_view)
        return [result]

    monkeypatch.setattr(type(model), "answer", through_adapter)
    monkeypatch.setattr(type(model), "answer_direct", direct)
    for frames in (3, 12, 20, 32):
        seen.clear()
        cell = measure_cell(model, files, token_f1, frames, 32, max_new_tokens=2)
        assert set(seen) == {frames}
        assert cell["videos"] == (2 if frames <= 12 else 1)
        left_out = [] if frames <= 12 else ["short.mp4 (12 frames)"]
        assert cell["left_out"] == left_out
        assert cell["questions"] == (3 if frames <= 12 else 2)


def test_no_video_is_long_enough(model, files):
    cell = measure_cell(model, files, token_f1, 64, 32)
    assert cell["failed"] == "no video has 64 frames" and len(cell["left_out"]) == 2
    assert "score_change" not in cell


def test_a_cell(model, files):
    cell = measure_cell(model, files, token_f1, 4, 32, max_new_tokens=4)
    clips = [model.load_clip(e.video, FrameSampling(4, 32, exact_frames=True)) for e in files]
    texts = [e.prompt for e in files]
    direct = model.answer_direct(texts, clips, 32, max_new_tokens=4)
    adapter = model.answer(texts, model.internalize(clips, longest_edge=32), max_new_tokens=4)
    ratio = sum(a.prompt_tokens for a in direct) / sum(a.prompt_tokens for a in adapter)
    assert cell["token_reduction"] == pytest.approx(ratio)
    change = [
        e.score(a.text, token_f1) - e.score(d.text, token_f1)
        for e, a, d in zip(files, adapter, direct, strict=True)
    ]
    assert cell["score_change"]["estimate"] == pytest.approx(sum(change) / 3)
    assert cell["speedup"] == cell["first_token_direct"] / cell["first_token_adapter"] > 0
    assert set(cell["internalization"]) >= {"decode", "encode frames", "generate adapter"}
    assert all(seconds > 0 for seconds in cell["internalization"].values())
    for peak in ("peak_direct", "peak_internalization"):
        assert cell[peak] is None or cell[peak] > 10e6


def test_goes_on_where_it_was(model, files, tmp_path, monkeypatch):
    measure, calls = module.measure_cell, []

    def interrupted(*args):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(args[3:5])
        return measure(*args)

    monkeypatch.setattr(module, "measure_cell", interrupted)
    run = (model, files, token_f1, tmp_path / "cells", (2, 4), (32, 64), 2)
    with pytest.raises(KeyboardInterrupt):
        sweep(*run)
    assert len(list((tmp_path / "cells").glob("*x*.json"))) == 3
    calls.clear()
    rows = sweep(*run)["rows"]
    assert calls == [(4, 64)]
    assert [(r["frames"], r["longest_edge"]) for r in rows] == [(2, 32), (2, 64), (4, 32), (4, 64)]
    calls.clear()
    assert sweep(*run)["rows"] == rows and not calls
    with pytest.raises(ConfigError, match="made with questions="):
        sweep(model, files[:2], *run[2:])


def test_out_of_memory_is_a_result(model, files, monkeypatch):
    def fail(*args, **kwargs):
        raise module.torch.OutOfMemoryError("too large")

    monkeypatch.setattr(type(model), "answer_direct", fail)
    cell = measure_cell(model, files, token_f1, 4, 32)
    assert cell == {"frames": 4, "longest_edge": 32, "failed": "out of memory"}
