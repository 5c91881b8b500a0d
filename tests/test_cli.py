"""Every command as a user types it, on the shipped pair and a real H.264 file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from v2l_fast import cli
from v2l_fast.adapter import Adapter
from v2l_fast.interop.peft import validate_peft
from v2l_fast.loading import ASSETS
from v2l_fast.model import Video2LoRA
from v2l_fast.shapes.language import caption
from v2l_fast.shapes.render import write_clip
from v2l_fast.shapes.scene import sample_scenes

NANO = Path(__file__).parent / "data" / "interop" / "nano.pt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two clips and their adapters, made by the command."""
    folder = tmp_path_factory.mktemp("cli")
    videos = [
        write_clip(scene, folder / f"{i}.mp4")
        for i, scene in enumerate(sample_scenes("test", 2, seed=3))
    ]
    run("internalize", *videos, "--out", folder / "adapters")
    return folder


def run(*arguments, stdin: str | None = None) -> str:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], input=stdin)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


def fails(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["v2l", *(str(a) for a in arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code, capsys.readouterr().err


def test_internalize_one(folder, tmp_path):
    target = tmp_path / "new" / "clip.safetensors"
    options = ("--out", target, "--decoder", "pyav", "--json")
    (row,) = json.loads(run("internalize", folder / "0.mp4", *options))
    assert row["frames"] == 8 and row["duration"] == 8.0 and row["bytes"] == target.stat().st_size
    same = Adapter.load(folder / "adapters" / "0.safetensors")
    found = Adapter.load(target)
    assert all(torch.equal(found.A[m], same.A[m]) for m in same.A)
    assert found.provenance["source"]["name"] == "0.mp4"


def test_internalize_in_chunks(folder, tmp_path):
    target = tmp_path / "clip.safetensors"
    (row,) = json.loads(
        run("internalize", folder / "0.mp4", "--out", target, "--chunks", 4, "--json")
    )
    assert (row["chunks"], row["frames"], row["duration"]) == (4, 8, 8.0)
    assert Adapter.load(target).rank == 4 * Adapter.load(folder / "adapters" / "0.safetensors").rank


def test_ask_every_question_about_every_adapter(folder):
    files = [folder / "adapters" / f"{i}.safetensors" for i in (0, 1)]
    questions = ["What color is the background?", "Describe the video."]
    rows = json.loads(run("ask", *files, *questions, "--without", "--json"))
    assert [(r["adapter"], r["question"]) for r in rows] == [
        (name, q) for name in (*map(str, files), "(no adapter)") for q in questions
    ]
    assert all(row["visual_tokens"] == 0 for row in rows)
    scenes = sample_scenes("test", 2, seed=3)
    assert [rows[0]["text"], rows[2]["text"]] == [scene.background for scene in scenes]
    alone = run("ask", files[0], questions[0])
    assert alone.strip() == rows[0]["text"]
    assert caption(scenes[0]).split()[-1] == "background."


def test_chat(folder):
    file = folder / "adapters" / "0.safetensors"
    said = run("chat", file, stdin="What color is the background?\nHow many objects are there?\n\n")
    assert said.splitlines() == [
        run("ask", file, question).strip()
        for question in ("What color is the background?", "How many objects are there?")
    ]


def test_compose_and_effect(folder, tmp_path):
    files = [folder / "adapters" / f"{i}.safetensors" for i in (0, 1)]
    run("compose", *files, "--out", tmp_path / "both.safetensors")
    assert Adapter.load(tmp_path / "both.safetensors").rank == 2 * Adapter.load(files[0]).rank
    found = json.loads(run("analyze", "effect", files[0], "Describe the video.", "--json"))
    assert found["logit_shift"] > 0 and found["divergence"] > 0
    assert found["answer"] != found["answer_without"]
    assert "update norm" in run("analyze", "effect", files[0], "Describe the video.")


def test_export(folder, tmp_path):
    base = str(ASSETS / "shapes" / "base")
    file = folder / "adapters" / "0.safetensors"
    run("export", file, "--peft", tmp_path / "peft", "--llama", tmp_path / "llama", "--base", base)
    validate_peft(tmp_path / "peft", Video2LoRA.from_pretrained("shapes").backbone.model, base)
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["model_type"] == "llama"


def test_convert(tmp_path):
    assert "87,544 parameters" in run("convert", NANO, tmp_path / "nano")
    assert sorted(p.name for p in (tmp_path / "nano").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_demo_keeps_what_it_made(tmp_path):
    shown = run("demo", "--keep", tmp_path)
    assert "visual" in shown and "reference" in shown
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", "clip.safetensors"]


def test_doctor():
    parts = {finding["part"]: finding for finding in json.loads(run("doctor", "--json"))}
    assert parts["torch"]["present"] and torch.__version__ in parts["torch"]["found"]
    assert "torch" in run("doctor")


def test_version():
    assert run("--version").strip() == "0.1.0"


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (("ask", "nowhere.safetensors", "What happens?"), 1, "nowhere.safetensors: no such file"),
        (("internalize", "nowhere.mp4", "--out", "x.safetensors"), 1, "nowhere.mp4: no such file"),
        (("internalize", "a.mp4", "--out", "x", "--decoder", "vlc"), 2, "auto, pyav"),
        (("internalize", "--manifest", "m", "--out", "x", "--batch-size", "0"), 2, "batch-size"),
        (("convert", "nowhere.pt", "out"), 1, "nowhere.pt"),
        (("ask", "What happens?"), 2, "adapter file"),
        (("ask", "a.safetensors"), 2, "at least one question"),
        (("ask", "a.safetensors", "q", "--dtype", "int8"), 2, "float32, bfloat16, float16"),
        (("export", "--llama", "out", "clip.safetensors"), 2, "--peft"),
        (("export",), 2, "--peft FOLDER"),
        (("ask", "a.safetensors", "q", "--temperature", "hot"), 2, "temperature"),
        (("nothing",), 2, "nothing"),
    ],
)
def test_failures(arguments, code, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    found, said = fails(monkeypatch, capsys, *arguments)
    assert found == code
    assert words in " ".join(said.replace("│", " ").split())
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_names_its_remedy(monkeypatch, capsys):
    def evaluate(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy.stats")

    monkeypatch.setattr(cli, "app", evaluate)
    code, said = fails(monkeypatch, capsys, "shapes", "evaluate")
    assert code == 1 and "v2l_fast[eval]" in said
