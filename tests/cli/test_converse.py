"""Conversations that ask, personas and simulations as a user types them."""

from __future__ import annotations

import json
import stat

import pytest
from typer.testing import CliRunner

from v2l_fast import cli
from v2l_fast.shapes.render import write_clip
from v2l_fast.shapes.viewers import ambiguous_scenes
from v2l_fast.shapes.world import sample_scenes


def run(*arguments, stdin: str | None = None, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], input=stdin)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.stdout


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Adapter of a clip of two objects, of which sampled answers name now one, now the other."""
    folder = tmp_path_factory.mktemp("converse")
    scene = ambiguous_scenes(sample_scenes("test", 12, 0))[5]
    write_clip(scene, folder / "clip.mp4")
    run("internalize", folder / "clip.mp4", "--out", folder / "clip.safetensors")
    return folder / "clip.safetensors"


def test_chat_asks_which_object_is_meant_and_keeps_the_persona(adapter, tmp_path):
    options = ("--elicit", "--schema", "shapes", "--persona", tmp_path / "me.json")
    said = "What color is the object?\nThe second one.\nHow does the object move?\n"
    asked, *answers = run("chat", adapter, *options, stdin=said).splitlines()
    assert asked == "Do you mean the first or the second object?" and len(answers) == 2
    assert stat.S_IMODE((tmp_path / "me.json").stat().st_mode) == 0o600
    # A later conversation knows the person.
    (color,) = run("chat", adapter, *options, stdin="What color is the object?\n").splitlines()
    # Where the sampled answers differ, the reply says that it is not sure.
    assert color.removeprefix("I am not sure about the video: ") == answers[0]


def test_commands_within_a_conversation(adapter, tmp_path):
    options = ("--elicit", "--schema", "shapes", "--persona", tmp_path / "me.json")
    said = "The second one.\n/persona\n/forget f1\n/persona\n/reset\n"
    lines = run("chat", adapter, *options, stdin=said).splitlines()
    assert lines[1:] == ["f1 focus: second", "forgotten", "nothing", "a new conversation"]
    assert "second" not in (tmp_path / "me.json").read_text()


def test_a_trace_has_a_line_for_every_turn(adapter, tmp_path):
    trace = tmp_path / "trace.jsonl"
    run("chat", adapter, "--elicit", "--trace", trace, stdin="What color?\nWhat size?\n")
    turns = [json.loads(line) for line in trace.read_text().splitlines()]
    assert [turn["action"] in ("ask", "answer") for turn in turns] == [True, True]


def test_forgotten_words_are_in_no_file(adapter, tmp_path):
    trace, persona = tmp_path / "trace.jsonl", tmp_path / "me.json"
    options = ("--elicit", "--schema", "shapes", "--persona", persona, "--trace", trace)
    said = "The second one.\nWhat color is the second object?\n/why\n/stop\n/forget f1\n"
    lines = run("chat", adapter, *options, stdin=said).splitlines()
    assert "fitted to: focus: second" in lines[2] and lines[3:] == [
        "no more questions",
        "forgotten",
    ]
    assert [json.loads(line)["forgotten"] for line in trace.read_text().splitlines()] == [True] * 2
    for path in tmp_path.iterdir():
        assert "second" not in path.read_text().replace("seconds", ""), path
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_chat_without_a_reasoner_needs_an_adapter():
    assert run("chat", code=2) == run("chat", "--elicit", code=2) == ""


def test_persona_commands(tmp_path):
    from v2l_fast.conversation import Persona, Schema
    from v2l_fast.conversation.persona import Statement

    drama = Statement("wants a drama", "genre", "drama")
    statements = [(drama, 1.0), (Statement("likes tea"), 1.0)]
    path = tmp_path / "me.json"
    Persona().update(statements, 0, "evidence", Schema.load("movies"), 0.0)[0].save(path)
    assert "likes tea" in run("persona", "show", path)
    run("persona", "export", path, "--out", tmp_path / "all.json")
    run("persona", "export", path, "--out", path, code=1)
    run("persona", "forget", path, code=1)
    run("persona", "forget", path, "--slot", "genre")
    assert "drama" not in path.read_text() and "likes tea" in path.read_text()
    run("persona", "forget", path, "--all")
    facts = json.loads(run("persona", "show", path, "--json"))["facts"]
    assert [fact["text"] for fact in facts] == ["", ""]


def test_simulate_and_report(tmp_path):
    record = tmp_path / "people.json"
    run("cper", "simulate", "--users", 4, "--out", record)
    assert json.loads(record.read_text())["users"] == 4
    run("cper", "simulate", "--users", 4, "--out", record, code=1)
    page = tmp_path / "page"
    run("cper", "report", "--out", page, "--preferences", record)
    assert "4 people" in (page / "README.md").read_text()


def test_calibrate_and_use_the_threshold(adapter, tmp_path):
    path = tmp_path / "threshold.json"
    options = ("--encoder", "ngrams", "--users", 4, "--out", path)
    run("cper", "calibrate", *options, code=1)
    assert "ask above" in run("cper", "calibrate", "--ask-rate", 0.3, *options)
    chat = ("chat", adapter, "--elicit", "--schema", "shapes", "--threshold", path)
    assert run(*chat, stdin="Hello.\n").count("\n") == 1
    path.write_text(path.read_text().replace("ngrams-512", "minilm"))
    run(*chat, stdin="Hello.\n", code=1)
