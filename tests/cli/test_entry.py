"""Commands about adapters and errors of all commands, on the shipped pair and H.264 files."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from tests.cli.commands import fail, run
from v2l_fast import cli
from v2l_fast.cli import install
from v2l_fast.errors import ConfigError, PromptTooLong
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.interop.peft import validate_peft
from v2l_fast.loading import ASSETS
from v2l_fast.model import Video2LoRA
from v2l_fast.shapes.language import caption
from v2l_fast.shapes.render import write_clip
from v2l_fast.shapes.world import sample_scenes

NANO = Path(__file__).parents[1] / "fixtures" / "interop" / "nano.pt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two clips, and their adapters from the command."""
    folder = tmp_path_factory.mktemp("cli")
    videos = [
        write_clip(scene, folder / f"{i}.mp4")
        for i, scene in enumerate(sample_scenes("test", 2, seed=3))
    ]
    run("internalize", *videos, "--out", folder / "adapters")
    return folder


def test_internalize_one(folder, tmp_path):
    target = tmp_path / "new" / "clip.safetensors"
    options = ("--out", target, "--decoder", "pyav", "--json")
    (row,) = json.loads(run("internalize", folder / "0.mp4", *options))
    assert row["frames"] == 8 and row["duration"] == 8.0 and row["bytes"] == target.stat().st_size
    same = Adapter.load(folder / "adapters" / "0.safetensors")
    result = Adapter.load(target)
    assert all(torch.equal(result.A[m], same.A[m]) for m in same.A)
    assert result.provenance["source"]["name"] == "0.mp4"


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
    questions = "What color is the background?", "How many objects are there?"
    alone = [run("ask", file, question).strip() for question in questions]
    output = run("chat", file, "--no-history", stdin="\n".join((*questions, "", "")))
    assert output.splitlines() == alone
    # The second question of a conversation is asked after the first; /reset forgets.
    said = (questions[0], questions[1], "/history", "/reset", "/history", questions[1])
    first, second, told, reset, nothing, fresh = run(
        "chat", file, stdin="\n".join(said)
    ).splitlines()
    messages = [
        {"role": "user", "content": questions[0]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": questions[1]},
    ]
    model = Video2LoRA.from_pretrained("shapes-any", device="cpu")
    assert [first, fresh] == alone and second == model.ask(messages, file)
    history = [*messages, {"role": "assistant", "content": second}]
    assert told == "\\n".join(f"{m['role']}: {m['content']}" for m in history)
    assert (reset, nothing) == ("a new conversation", "nothing yet")


def test_a_chat_beyond_the_context_says_so(folder, monkeypatch):
    file = folder / "adapters" / "0.safetensors"
    monkeypatch.setattr(Video2LoRA, "context_length", 160)
    result = CliRunner().invoke(cli.app, ["chat", str(file)], input="What color is it?\n" * 9)
    assert isinstance(result.exception, PromptTooLong)
    assert "context of 160" in str(result.exception) and "/reset" in str(result.exception)


def test_compose_and_effect(folder, tmp_path):
    files = [folder / "adapters" / f"{i}.safetensors" for i in (0, 1)]
    run("compose", *files, "--out", tmp_path / "both.safetensors")
    assert Adapter.load(tmp_path / "both.safetensors").rank == 2 * Adapter.load(files[0]).rank
    result = json.loads(run("analyze", "effect", files[0], "Describe the video.", "--json"))
    assert result["logit_shift"] > 0 and result["divergence"] > 0
    assert result["answer"] != result["answer_without"]
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


def test_demo_keeps_its_files(tmp_path):
    output = run("demo", "--keep", tmp_path)
    assert "visual" in output and "reference" in output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", "clip.safetensors"]


def test_doctor():
    parts = {finding["part"]: finding for finding in json.loads(run("doctor", "--json"))}
    # torch's own version names its build, which the distribution's may not.
    version = torch.__version__.partition("+")[0]
    assert parts["torch"]["present"] and version in parts["torch"]["detail"]
    assert "torch" in run("doctor")


@pytest.mark.parametrize(
    ("version", "capability", "sound"),
    [("12.8", (9, 0), False), ("13.3", (9, 0), True), ("12.8", (8, 0), True)],
)
def test_doctor_reports_an_old_assembler_on_hopper(monkeypatch, version, capability, sound):
    tool = SimpleNamespace(version=version, path="/usr/bin/ptxas")
    knobs = SimpleNamespace(nvidia=SimpleNamespace(ptxas=tool))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(knobs=knobs))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    (finding,) = install._ptxas()
    assert finding.present == sound and version in finding.detail
    assert ("TRITON_PTXAS_PATH" in finding.detail) == (not sound)


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
        (("ask", "a.safetensors", "q", "--temperature", "hot"), 2, "got 'hot'"),
        (("ask", "a.safetensors", "q", "--device", "tpu"), 2, "must be cpu, cuda or cuda:N"),
        (("ask", "a.safetensors", "q", "--device", "mps"), 2, "must be cpu, cuda or cuda:N"),
        (("ask", "a.safetensors", "q", "--seed", "9" * 20), 2, "2^63 - 1"),
        (("internalize", "clip.mp4", "--out", ""), 2, "must name a file or a folder"),
        (("ask", "a.safetensors", "\udcff"), 1, "not UTF-8"),
        (("analyze", "effect", "a.safetensors", "\udcff"), 1, "not UTF-8"),
        (("internalize", "a.mp4", "--out", "n" * 300), 1, "choose a shorter name"),
        (("compose", "a.safetensors", "--out", "b/"), 2, "must name a file"),
        (("shapes", "render", "new", "--count", "0"), 2, "count"),
        (("train", "--config", "shapes", "run.folder="), 1, "run.folder on the command line"),
        (("train", "--config", "shapes", f"run.seed={2**40}"), 1, "must be at most 4294967295"),
        (("train", "--config", "shapes", "data.longest_edge=5000"), 1, "must be at most 4096"),
        (("nothing",), 2, "nothing"),
    ],
)
def test_failures(arguments, code, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    exit_code, stderr = fail(monkeypatch, capsys, *arguments)
    assert exit_code == code
    assert words in " ".join(stderr.replace("│", " ").split())
    assert "Traceback" not in stderr
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_names_its_remedy(monkeypatch, capsys):
    def evaluate(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy.stats")

    monkeypatch.setattr(cli, "app", evaluate)
    code, stderr = fail(monkeypatch, capsys, "shapes", "evaluate")
    assert code == 1 and "v2l_fast[eval]" in stderr


# --- what a command must not destroy --------------------------------------------------------------


def refused(monkeypatch, capsys, *arguments, words: str) -> None:
    code, stderr = fail(monkeypatch, capsys, *arguments)
    assert code == 1 and words in stderr and stderr.count("\n") == 1, stderr


def test_no_command_destroys_its_input(folder, tmp_path, monkeypatch, capsys):
    video, adapter = tmp_path / "mine.mp4", tmp_path / "mine.safetensors"
    video.write_bytes((folder / "0.mp4").read_bytes())
    adapter.write_bytes((folder / "adapters" / "0.safetensors").read_bytes())
    (tmp_path / "link").symlink_to(video)
    held = tmp_path / "peft"
    held.mkdir()
    inside = held / "adapter_model.safetensors"
    inside.write_bytes(adapter.read_bytes())
    model = tmp_path / "base"
    model.mkdir()
    (model / "config.json").write_text("{}")
    for arguments in (
        ("internalize", video, "-o", video),
        ("internalize", video, "-o", tmp_path / "link"),
        ("compose", adapter, adapter, "-o", adapter),
        ("convert", NANO, NANO.parent),
        ("export", inside, "--peft", held),
        ("export", "--llama", model, "--base", model),
    ):
        refused(monkeypatch, capsys, *arguments, "--force", words="the input")
    assert video.read_bytes() == (folder / "0.mp4").read_bytes()
    assert inside.read_bytes() == adapter.read_bytes() and NANO.stat().st_size > 1000


def test_no_command_replaces_a_file_without_force(folder, tmp_path, monkeypatch, capsys):
    files = []
    for name in (
        "a.safetensors", "demo/clip.mp4", "clips/manifest.jsonl", "peft/x", "nano/config.json",
        "adapters/0.safetensors", "taught/manifest.jsonl", "run/log.jsonl", "eval/table.md",
        "record.json", "page/README.md",
    ):  # fmt: skip
        files.append(tmp_path / name)
        files[-1].parent.mkdir(exist_ok=True)
        files[-1].write_text("mine")
    adapter, spans = folder / "adapters" / "0.safetensors", tmp_path / "spans"
    taught = tmp_path / "clips" / "manifest.jsonl"
    spans.mkdir()
    for arguments in (
        ("internalize", folder / "0.mp4", "-o", tmp_path / "a.safetensors"),
        ("internalize", folder / "0.mp4", "-o", tmp_path / "adapters"),
        ("compose", adapter, "-o", tmp_path / "a.safetensors"),
        ("convert", NANO, tmp_path / "nano"),
        ("export", adapter, "--peft", tmp_path / "peft"),
        ("export", "--llama", tmp_path / "peft"),
        ("demo", "--keep", tmp_path / "demo"),
        ("shapes", "render", tmp_path / "clips"),
        ("shapes", "evaluate", "--record", tmp_path / "record.json"),
        ("shapes", "train-vlm", "--record", tmp_path / "record.json", "--folder", tmp_path / "vlm"),
        ("shapes", "report", "--out", tmp_path / "page", "--records", tmp_path / "records"),
        ("finevideo", "build", spans, "-o", tmp_path / "record.json"),
        ("teach", "--manifest", taught, "--out", tmp_path / "taught"),
        ("teach", "--manifest", taught, "--out", tmp_path / "clips"),
        ("train", "-c", "shapes", "model.base=shapes", f"run.folder={tmp_path / 'run'}"),
    ):
        code, stderr = fail(monkeypatch, capsys, *arguments)
        assert code == 1 and stderr.startswith("error:") and stderr.count("\n") == 1, (
            arguments,
            stderr,
        )
    assert all(path.read_text() == "mine" for path in files)


def test_force_replaces(folder, tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("mine")
    run("compose", folder / "adapters" / "0.safetensors", "-o", target, "--force")
    assert Adapter.load(target).rank
    run("convert", NANO, tmp_path / "nano")
    run("convert", NANO, tmp_path / "nano", "--force")


def test_a_device_is_written_to(folder):
    run("compose", folder / "adapters" / "0.safetensors", "-o", "/dev/null")
    assert Path("/dev/null").is_char_device()


def test_a_folder_that_cannot_be_written(folder, tmp_path, monkeypatch, capsys):
    """The superuser may write unless the file system refuses, as this one does."""

    def refuse(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    adapter, manifest = folder / "adapters" / "0.safetensors", tmp_path / "manifest.jsonl"
    manifest.write_text("{}")
    out = tmp_path / "out"
    for arguments in (
        ("internalize", folder / "0.mp4", "-o", out),
        ("compose", adapter, "-o", out),
        ("convert", NANO, out),
        ("export", adapter, "--peft", out),
        ("demo", "--keep", out),
        ("shapes", "render", out),
        ("evaluate", "--manifest", manifest, "--out", out),
        ("analyze", "norms", adapter, "--out", out),
        ("sweep", "--manifest", manifest, "--out", out),
        ("teach", "--manifest", manifest, "--out", out),
        ("cache", "--manifest", manifest, "--cache", out),
        ("train", "-c", "shapes", "model.base=shapes", f"run.folder={out}"),
    ):
        refused(monkeypatch, capsys, *arguments, words="Read-only file system; choose a folder")
    assert not out.exists()


# --- names and answers are data -------------------------------------------------------------------


def test_names_and_questions_are_shown_as_they_are(folder, tmp_path):
    video = tmp_path / "c [final]\x1b[31m.mp4"
    video.write_bytes((folder / "0.mp4").read_bytes())
    output = run("internalize", video, "-o", f"{tmp_path}/new/")
    assert "c [final]\\x1b[31m.safetensors: 8 frames" in output and "\x1b" not in output
    target = tmp_path / "new" / "c [final]\x1b[31m.safetensors"
    other = tmp_path / "b.adapter"
    other.write_bytes(target.read_bytes())
    # Adapters are recognized by their content.
    output = run("ask", target, other, "[/]", "Is [red] the [shape] here?\nWhat?")
    rows = [line for line in output.splitlines() if "│" in line]
    assert len(rows) == 4 and "[/]" in rows[0] and "\x1b" not in output
    assert "Is [red] the [shape] here?\\nWhat?" in rows[1]


def test_answers_are_one_line_each_outside_a_terminal(folder, monkeypatch):
    file = folder / "adapters" / "0.safetensors"
    long = "word " * 60 + "\nend"
    answer = Video2LoRA.answer

    def lengthen(*args, **options):
        return [replace(a, text=long) for a in answer(*args, **options)]

    monkeypatch.setattr(Video2LoRA, "answer", lengthen)
    line = long.replace("\n", "\\n") + "\n"
    assert run("ask", file, "What?") == line
    assert run("chat", file, stdin="What?\nWho?\n") == 2 * line
    assert len(run("ask", file, "What?", "Who?").splitlines()) == 6


def test_chat_refuses_bytes_that_are_not_text(folder):
    file = folder / "adapters" / "0.safetensors"
    result = CliRunner().invoke(cli.app, ["chat", str(file)], input=b"\xff\xfe what?\n")
    assert isinstance(result.exception, ConfigError)
    assert "line 1 is not UTF-8" in str(result.exception)


def test_one_bad_file_does_not_stop_the_others(folder, tmp_path):
    bad = tmp_path / "bad.mp4"
    bad.write_text("text")
    arguments = [folder / "0.mp4", bad, tmp_path / "none.mp4", folder / "1.mp4", "-o", tmp_path]
    result = CliRunner().invoke(cli.app, ["internalize", *map(str, arguments), "--json"])
    assert result.exit_code == 1
    rows = json.loads(result.stdout)
    assert ["error" in row for row in rows] == [False, True, True, False]
    assert "2 of 4 videos internalized, 2 failed" in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "0.safetensors", "1.safetensors", "bad.mp4"
    ]  # fmt: skip


def test_a_file_that_is_not_an_adapter_is_named(folder, tmp_path, monkeypatch, capsys):
    code, stderr = fail(monkeypatch, capsys, "ask", folder / "0.mp4", "What?")
    assert code == 2 and "0.mp4 is another file" in stderr


def test_frames_have_a_maximum_size(folder, tmp_path, monkeypatch, capsys):
    refused(
        monkeypatch, capsys, "internalize", folder / "0.mp4", "-o", tmp_path / "a",
        "--longest-edge", "100000", words="longest_edge must be at most 4096, got 100000",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_adapter_serves_every_dtype(folder, dtype):
    """Its factors are in float32."""
    file = folder / "adapters" / "0.safetensors"
    assert run("ask", file, "What color is the background?", "--dtype", dtype).strip()
