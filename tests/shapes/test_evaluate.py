"""Evaluation code on an untrained pair, and the commands' plumbing."""

import json

import pytest
import torch
from typer.testing import CliRunner

from v2l_fast.hypernet import HyperNetwork
from v2l_fast.model import Video2LoRA
from v2l_fast.shapes.cli import app
from v2l_fast.shapes.evaluate import (
    Answers,
    direct_answerer,
    evaluate,
    evaluate_files,
    questions_for,
    rendered_clips,
    score,
)
from v2l_fast.shapes.language import caption
from v2l_fast.shapes.scene import sample_scenes
from v2l_fast.shapes.train_hypernet import shapes_hypernet_config


def test_perfect_and_wrong_answers_score_as_such():
    scenes = sample_scenes("test", 20, 0)
    questions = questions_for(scenes, 0)
    assert len(questions) == 100 and questions == questions_for(scenes, 0)
    perfect = Answers([caption(s) for s in scenes], [turn.answer for _, turn in questions])
    scores = score(perfect, scenes, questions)
    for name in ("caption_attributes", "caption_exact", "caption_token_f1", "qa_exact"):
        assert scores[name]["estimate"] == 1.0
    assert set(scores["qa_by_kind"].values()) == {1.0}

    silent = score(Answers([""] * 20, ["nothing"] * 100), scenes, questions)
    assert silent["caption_attributes"]["estimate"] == silent["qa_exact"]["estimate"] == 0.0

    half = [turn.answer if video % 2 else "nothing" for video, turn in questions]
    assert score(Answers(perfect.captions, half), scenes, questions)["qa_exact"]["estimate"] == 0.5


@pytest.fixture
def fresh(base):
    torch.manual_seed(0)
    return Video2LoRA(base, HyperNetwork(shapes_hypernet_config(base)))


def test_every_condition_is_measured(fresh):
    result = evaluate(fresh, sample_scenes("test", 4, 0))
    assert list(result["conditions"]) == [
        "direct", "adapter", "other video's adapter", "bias adapter only", "no adapter",
    ]
    # A fresh network's B is zero and so is its bias: its adapters change nothing.
    conditions = result["conditions"]
    assert conditions["adapter"] == conditions["no adapter"]
    assert set(result["adapter_minus_direct"]) == {"caption_token_f1", "qa_exact"}
    json.dumps(result)


def test_files_are_compared_with_rendering(fresh):
    files = evaluate_files(fresh, sample_scenes("test", 2, 0))
    assert {"direct, file", "adapter, rendered"} <= set(files)


def test_batched_direct_answers_are_those_of_ask_direct(fresh):
    clips = rendered_clips(sample_scenes("test", 3, 0))
    texts = ["What happens?", "How many objects are there?", "What happens?"]
    expected = [
        fresh.ask_direct(text, clip, max_new_tokens=40)
        for text, clip in zip(texts, clips, strict=True)
    ]
    assert direct_answerer(fresh.backbone, clips)(range(3), texts) == expected


def test_render_command_writes_clips(tmp_path):
    arguments = ["render", str(tmp_path), "--count", "2", "--size", "64"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "scenes.json").read_text())
    scenes = sample_scenes("test", 2, 0)
    assert list(written.values()) == [caption(scene) for scene in scenes]
    assert all((tmp_path / name).stat().st_size > 500 for name in written)


@pytest.mark.parametrize(
    ("option", "value"), [("--split", "holdout"), ("--size", "33"), ("--size", "8")]
)
def test_render_command_refuses_other_values(tmp_path, option, value):
    result = CliRunner().invoke(app, ["render", str(tmp_path), option, value])
    assert result.exit_code == 2
    assert value in result.output
    assert list(tmp_path.iterdir()) == []
