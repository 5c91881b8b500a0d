"""Text is plain as it is, and no name or answer controls the terminal."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import select
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from v2l_fast import console
from v2l_fast.console import PlainConsole, printable, progress_bar
from v2l_fast.errors import WriteError

HOSTILE = "[/] [red]a[/red] :smile: \x1b[31mred\x1b[0m \r\x07\x9b1m\u202etxt"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_control_characters_are_escaped():
    assert printable("[red] é 動画 👩‍👧 clip.mp4") == "[red] é 動画 👩‍👧 clip.mp4"
    assert printable("a\x1b[31m\r\n\t\x7f\x9b") == "a\\x1b[31m\\r\\n\\t\\x7f\\x9b"
    assert printable("a\nb\tc\r", lines=True) == "a\nb\tc\\r"
    assert printable("\u202egpj.exe\u2028\udcff") == "\\u202egpj.exe\\u2028\\udcff"


def test_all_functions_show_text_as_it_is(capsys):
    console.say(HOSTILE)
    console.show(HOSTILE)
    console.show_table((HOSTILE, "b"), [(HOSTILE, "[/x]")], HOSTILE)
    text = capsys.readouterr().out
    assert text.count("[/] [red]a[/red] :smile: ") == 5 and "[/x]" in text
    assert not set(text) & set("\x1b\r\x07\x9b\u202e")
    console.show_json({"a": HOSTILE})
    text = capsys.readouterr().out
    assert json.loads(text) == {"a": HOSTILE}
    assert not set(text) & set("\x1b\r\x07\x9b\u202e")


def test_a_warning_names_a_file_safely(capsys):
    record = logging.makeLogRecord({"msg": "%s: cut", "args": (HOSTILE,), "levelno": 30})
    console.NoteHandler().emit(record)
    stderr = capsys.readouterr().err
    assert stderr.startswith("warning: [/] [red]a[/red]") and stderr.count("\n") == 1
    assert not set(stderr) & set("\x1b\r\x07\x9b\u202e")


def test_outside_a_terminal_nothing_is_wrapped(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    console.say("word " * 1000)
    console.show_table(("name", "text"), [("a", "word " * 100), ("b", "word")])
    assert len(capsys.readouterr().out.splitlines()) == 1 + 6


def test_a_narrow_terminal_gets_blocks(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    narrow = PlainConsole(width=40, height=20, force_terminal=False)
    monkeypatch.setattr(console, "out", narrow)
    names = [f"column_number_{n}" for n in range(6)]
    console.show_table(names, [tuple("123456"), tuple("abcdef")])
    lines = sys.stdout.getvalue().splitlines()
    assert lines[0].split() == ["column_number_0", "1"] and len(lines) == 14
    console.show_table(("name", "text"), [("a", "word " * 20)])
    assert "┃" in sys.stdout.getvalue()


def test_progress_outside_a_terminal_is_plain_lines():
    file = io.StringIO()
    plain = PlainConsole(file=file)

    def wait(words: str) -> None:
        limit = time.monotonic() + 60
        while words not in file.getvalue():
            assert time.monotonic() < limit
            time.sleep(0.001)

    with progress_bar("clip [final].mp4\n", plain, first=0, seconds=0.01) as report:
        # Also before the first report, and between reports.
        wait("clip [final].mp4\\n: working, 0:0")
        report("decode", 9, 100)
        wait("clip [final].mp4\\n: decode 9/100, 0:0")
    assert all(line.endswith(" so far") for line in file.getvalue().splitlines())
    before = file.getvalue()
    with progress_bar("short", plain, first=3600) as report:
        report("decode", 0, 1)
    assert file.getvalue() == before


def test_a_full_device_is_an_error_and_a_closed_pipe_is_not():
    # Closing the file fails again, because of its pending output.
    with suppress(OSError), open("/dev/full", "w") as full:
        with pytest.raises(WriteError, match="No space left"):
            PlainConsole(file=full).write_line("text")
    read, write = os.pipe()
    os.close(read)
    with suppress(OSError), open(write, "w") as closed:
        with pytest.raises(BrokenPipeError):
            PlainConsole(file=closed).write_line("text")


def v2l(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "v2l_fast", *arguments], text=True, stderr=subprocess.PIPE, **options
    )


def test_standard_output_that_is_full_or_closed():
    with open("/dev/full", "w") as full:
        done = v2l("--version", stdout=full)
    assert done.returncode == 1
    assert done.stderr.startswith("error: standard output cannot be written: No space left")
    assert done.stderr.count("\n") == 1
    command = f"{sys.executable} -m v2l_fast --version >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: standard output cannot be written: Bad file descriptor")


def test_a_character_that_the_encoding_lacks():
    done = v2l("nothing-é", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_short_help_option():
    for command in ((), ("ask",), ("analyze", "rank"), ("shapes", "render"), ("finevideo",)):
        done = v2l(*command, "-h", stdout=subprocess.PIPE)
        assert done.returncode == 0 and "Usage:" in done.stdout, command


def test_wrong_usage_does_not_control_a_terminal():
    leader, follower = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "v2l_fast", "ask", "a", "b", "--dtype", "\x1b]0;title\x07[red]"],
        stdout=follower, stderr=follower,
    )  # fmt: skip
    os.close(follower)
    text = b""
    try:
        while select.select([leader], [], [], 0)[0]:
            text += os.read(leader, 65536)
    except OSError:
        # Linux reports the end of a terminal as an error.
        pass
    os.close(leader)
    assert done.returncode == 2 and rb"got \x1b]0;title\x07[red]" in text.replace(b"\r\n", b" ")
    assert b"\x1b]0;" not in text
