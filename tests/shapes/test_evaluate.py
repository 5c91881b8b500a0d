"""The shapes world's examples and attribute scores on an untrained pair, and its commands."""

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from v2l_fast.cli.shapes import app
from v2l_fast.data.manifest import load_manifest
from v2l_fast.errors import ConfigError
from v2l_fast.evaluation.answers import BASELINE, CONDITIONS, NONE, SYSTEM
from v2l_fast.evaluation.examples import token_f1
from v2l_fast.hypernet.config import HypernetConfig
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.model import Video2LoRA
from v2l_fast.shapes.evaluate import (
    CAPTIONS,
    QUESTIONS,
    attribute_share,
    direct_answers,
    evaluate,
    evaluate_direct,
    evaluate_files,
    evaluate_turns,
    exact_share,
    examples_for,
    rendered_clips,
    wrong_captions,
)
from v2l_fast.shapes.language import caption
from v2l_fast.shapes.looks import photograph
from v2l_fast.shapes.vlm import IMAGE_SIZE
from v2l_fast.shapes.world import sample_scenes


@pytest.fixture
def fresh(base):
    """An untrained pair of the shapes world's sizes."""
    text = base.decoder.config
    config = HypernetConfig(
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        target_modules={"down_proj": (text.intermediate_size, text.hidden_size)},
        rank=4,
        latent_size=32,
        num_blocks=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_frames=8,
        longest_edge=IMAGE_SIZE,
    )
    torch.manual_seed(0)
    return Video2LoRA(base, HyperNetwork(config))


def test_examples_are_the_same_every_time():
    scenes = sample_scenes("test", 20, 0)
    examples = examples_for(scenes)
    assert examples == examples_for(scenes)
    assert examples != examples_for(scenes, seed=1)
    captions = [e for e in examples if e.is_caption]
    assert [e.target_text for e in captions] == [caption(scene) for scene in scenes]
    assert {e.dataset for e in captions} == {CAPTIONS}
    assert [e.dataset for e in examples].count(QUESTIONS) == 100
    assert len({e.id for e in examples}) == 120


def test_perfect_and_silent_captions_score_as_such():
    scenes = sample_scenes("test", 20, 0)
    right = [caption(scene) for scene in scenes]
    assert attribute_share(right, scenes).estimate == exact_share(right, scenes).estimate == 1.0
    assert attribute_share([""] * 20, scenes).estimate == 0.0
    half = [text if i % 2 else "nothing" for i, text in enumerate(right)]
    assert exact_share(half, scenes).estimate == 0.5


def test_swapped_words_are_wrong_captions_that_token_f1_does_not_see():
    scene = next(s for s in sample_scenes("test", 20, 0) if len(s.objects) == 2)
    first, second = (item.color for item in scene.objects)
    assert first != second
    swapped = caption(scene).replace(first, "?").replace(second, first).replace("?", second)
    captions = [caption(scene), swapped, "nothing"]
    assert wrong_captions(captions, [scene] * 3) == {"wrong": 2, "same_words": 1}
    assert token_f1(swapped, caption(scene)) == 1


def test_every_condition_is_measured(fresh):
    result = evaluate(fresh, sample_scenes("test", 4, 0))
    assert tuple(result["conditions"]) == CONDITIONS
    assert set(result["attributes"]) == set(result["caption_exact"]) == set(CONDITIONS)
    # A fresh network's B is zero and so is its bias: its adapters change nothing.
    assert all(sample[SYSTEM] == sample[NONE] for sample in result["samples"])
    assert result["attributes"][SYSTEM] == result["attributes"][NONE]
    assert {row["benchmark"] for row in result["metrics"]["token_f1"]["rows"]} == {
        CAPTIONS,
        QUESTIONS,
        "Average",
        "Pooled",
    }
    json.dumps(result)


def test_files_are_compared_with_rendering(fresh):
    turns = evaluate_turns(fresh, sample_scenes("test", 2, 0))
    assert turns.pop("videos") == 2 and len(turns) == 6
    assert all(0 <= share["estimate"] <= 1 for share in turns.values())
    files = evaluate_files(fresh, sample_scenes("test", 2, 0))
    assert {f"{BASELINE}, file", f"{SYSTEM}, rendered"} <= set(files)


def test_direct_answers_without_a_hypernetwork_are_those_with_one(fresh):
    clips = rendered_clips(sample_scenes("test", 3, 0))
    texts = ["What happens?", "How many objects are there?", "What happens?"]
    expected = fresh.answer_direct(texts, clips, max_new_tokens=40)
    assert direct_answers(fresh.backbone, clips, texts) == [a.text for a in expected]


def test_a_vlm_alone_is_scored(base):
    result = evaluate_direct(base, sample_scenes("test", 3, 0))
    assert result["videos"] == 3 and result["questions"] == 15
    assert 0 <= result["qa_exact"] <= 1 and 0 <= result["caption_token_f1"] <= 1
    json.dumps(result)


def test_render_command_writes_clips_and_their_manifest(tmp_path):
    arguments = ["render", str(tmp_path), "--count", "2", "--size", "64"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    examples = load_manifest(tmp_path / "manifest.jsonl", split="test")
    expected = examples_for(sample_scenes("test", 2, 0))
    assert [e.row() for e in examples] == [e.row() for e in expected]


@pytest.mark.parametrize(
    ("option", "value"), [("--split", "holdout"), ("--size", "33"), ("--size", "8")]
)
def test_render_command_refuses_other_values(tmp_path, option, value):
    result = CliRunner().invoke(app, ["render", str(tmp_path), option, value])
    assert result.exit_code == 2
    assert option in result.output
    assert list(tmp_path.iterdir()) == []


def test_missing_photographs_are_an_error_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    photograph.cache_clear()
    monkeypatch.setattr(Video2LoRA, "from_pretrained", None)
    result = CliRunner().invoke(app, ["evaluate", "--record", str(tmp_path / "record.json")])
    assert isinstance(result.exception, ConfigError)
    assert "v2l_fast[shapes]" in str(result.exception)
