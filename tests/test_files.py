"""Text and JSON files: any problem is reported at once in one bounded line; writes are atomic."""

from __future__ import annotations

import hashlib
import os
import socket
import tempfile

import pytest

from v2l_fast import files
from v2l_fast.errors import LINE_LENGTH, ConfigError, V2LError, excerpt
from v2l_fast.files import (
    append_jsonl,
    drop_torn_line,
    file_sha256,
    open_regular,
    parse_json,
    read_bytes,
    read_json,
    read_jsonl,
    read_lines,
    read_text,
    write_json,
    write_jsonl,
)

DEEP = 100_000

# Text of a JSON file -> words of the error.
BAD_JSON = {
    "[" * DEEP + "]" * DEEP: "nested more than 64 levels",
    '{"a":' * DEEP + "1" + "}" * DEEP: "nested more than 64 levels",
    "[" * 65 + "]" * 65: "nested more than 64 levels",
    "[" * DEEP: "nested more than 64 levels",
    "1" * 5000: "does not fit 64 bits",
    "-" + "9" * 100_000: "does not fit 64 bits",
    str(2**63): "does not fit 64 bits",
    "1" * 5000 + ".0": "not finite",
    "1e999": "not finite",
    "[1, -1E+400]": "not finite",
    "NaN": "not a finite number",
    '{"x": -Infinity}': "-Infinity is not a finite number",
    '{"a": 1, "b": {"c": 1, "c": 2}}': "key 'c' appears twice",
    '{"' + "k" * 100_000 + '": 1, "' + "k" * 100_000 + '": 2}': "appears twice",
    r'{"x": "half \ud83d"}': "half of a surrogate pair",
    r'{"\udc00": 1}': "half of a surrogate pair",
    r'"\ude00\ud83d"': "half of a surrogate pair",
    "": "not JSON",
    "{": "not JSON",
    "{'a': 1}": "not JSON",
    "[1, 2": "not JSON",
    "x" * 1_000_000: "not JSON",
    '"' + "x" * 1_000_000: "not JSON",
    '"a\x00b"': "not JSON",
    "\x1b[31mred": "not JSON",
}


def _check_bounded(error: pytest.ExceptionInfo, path: object) -> str:
    text = str(error.value)
    assert str(path) in text
    assert "\n" not in text and text.isprintable()
    assert len(text) <= LINE_LENGTH + 10
    assert error.value.__cause__ is None
    assert error.value.__context__ is None or error.value.__suppress_context__
    return text


@pytest.mark.parametrize("error", [V2LError, ConfigError])
@pytest.mark.parametrize(
    "text", BAD_JSON, ids=lambda text: f"{text[:10]!r}, {len(text)} characters".replace("\\", "/")
)
def test_invalid_json_is_refused(text, error, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(error, match=BAD_JSON[text]) as caught:
        read_json(path, error=error, remedy="write it again")
    assert _check_bounded(caught, path).endswith("; write it again")
    if "\n" not in text and text:
        path.write_text('{"sound": 1}\n' + text + "\n{}\n", encoding="utf-8")
        with pytest.raises(error, match=BAD_JSON[text]) as caught:
            list(read_jsonl(path, error))
        assert "line 2" in _check_bounded(caught, path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('\ufeff{"a": 1}', {"a": 1}),
        (r'"\ud83d\ude00 \\ud83d"', "😀 \\ud83d"),
        ('"😀\u2028"', "😀\u2028"),
        ("[" * 64 + "]" * 64, None),
        (str(2**63 - 1), 2**63 - 1),
        (str(-(2**63)), -(2**63)),
        ("1e308", 1e308),
        ("0." + "1" * 5000, 1 / 9),
        ("-0", 0),
        ('{"": null, "b": {"": 1}}', {"": None, "b": {"": 1}}),
    ],
)
def test_valid_json_is_accepted(text, value, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(text, encoding="utf-8")
    got = read_json(path)
    assert value is None or got == value
    assert [row for _, row in read_jsonl(path)] == [got]


def test_allow_nan_accepts_numbers_that_are_not_finite():
    nan, infinite = parse_json("[NaN, -Infinity]", "x", allow_nan=True)
    assert nan != nan and infinite == float("-inf")
    with pytest.raises(V2LError, match="64 bits"):
        parse_json("1" * 5000, "x", allow_nan=True)


def test_an_error_in_json_names_line_column_and_value(tmp_path):
    path = tmp_path / "file.json"
    path.write_text('{\n  "a": 1,\n  "b": oops\n}')
    with pytest.raises(V2LError, match=r"line 3, column 8, near 'oops\\n\}'"):
        read_json(path)


@pytest.mark.parametrize(("kind", "text"), [(dict, "[1]"), (list, "{}"), (dict, '"x"')])
def test_json_must_be_of_the_expected_kind(kind, text, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(V2LError, match="must hold a JSON (object|list), got"):
        read_json(path, kind=kind)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-32"])
def test_text_must_be_utf_8(encoding, tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes('{"a": "\n é"}'.encode(encoding))
    for read in (read_json, read_text, lambda path: list(read_lines(path))):
        with pytest.raises(V2LError, match="line [12] is not UTF-8 text") as caught:
            read(path)
        _check_bounded(caught, path)


@pytest.fixture
def special(tmp_path, request):
    """A path that is not a regular file."""
    path = tmp_path / "special"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "folder":
        path.mkdir()
    elif request.param == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    elif request.param == "socket":
        # The path of a socket may have at most 107 bytes.
        with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{short}/socket")
            yield f"{short}/socket"
        return
    elif request.param == "loop of links":
        path.symlink_to(path)
    elif request.param == "part of a file":
        (tmp_path / "file").write_text("x")
        path = tmp_path / "file" / "x"
    elif request.param == "long name":
        path = tmp_path / ("x" * 5000)
    elif request.param == "missing":
        pass
    else:
        path = request.param
    yield path


@pytest.mark.parametrize(
    "special",
    [
        "pipe",
        "folder",
        "link to a pipe",
        "socket",
        "loop of links",
        "part of a file",
        "long name",
        "missing",
        "/dev/zero",
        "/dev/null",
        "/dev/tty",
        "nul\0byte",
        "lone \ud800 surrogate",
        "",
    ],
    indirect=True,
)
@pytest.mark.parametrize("error", [V2LError, ConfigError])
def test_only_regular_files_are_read(special, error):
    for read in (open_regular, lambda path, error: read_json(path, error=error)):
        with pytest.raises(error) as caught:
            read(special, error)
        _check_bounded(caught, "")
    with pytest.raises(error):
        list(read_jsonl(special, error))


def test_a_symbolic_link_is_followed_only_if_allowed(tmp_path):
    (tmp_path / "file").write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_json(tmp_path / "link") == 1
    with pytest.raises(V2LError, match="a symbolic link"):
        open_regular(tmp_path / "link", follow=False)


def test_a_file_that_becomes_a_pipe_after_the_check_is_refused(tmp_path, monkeypatch):
    """The open file is checked, not only its path."""
    (tmp_path / "file").write_text("1")
    os.mkfifo(tmp_path / "pipe")
    sound = os.stat(tmp_path / "file")
    monkeypatch.setattr(os, "stat", lambda *_: sound)
    with pytest.raises(V2LError, match="a named pipe"):
        open_regular(tmp_path / "pipe")


def test_descriptors_are_closed(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("[")
    before = len(os.listdir("/proc/self/fd"))
    for name in ("pipe", "file", "none"):
        with pytest.raises(V2LError):
            read_json(tmp_path / name)
        with pytest.raises(V2LError):
            list(read_jsonl(tmp_path / name))
    assert len(os.listdir("/proc/self/fd")) == before


def test_reads_are_limited(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"1" * 10)
    assert read_bytes(path, 10) == b"1" * 10
    with pytest.raises(V2LError, match="larger than 9 bytes"):
        read_bytes(path, 9)
    with open(path, "wb") as handle:
        handle.truncate(2**40)
    for read in (read_json, lambda path: list(read_jsonl(path))):
        with pytest.raises(V2LError, match=r"l(arg|ong)er than [\d,]+ bytes") as caught:
            read(path)
        _check_bounded(caught, path)


def test_lines_are_limited(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\xef\xbb\xbfa\r\n\n\xe2\x80\xa8\x0bb\n\xef\xbb\xbfc")
    assert list(read_lines(path)) == [(1, "a\r\n"), (2, "\n"), (3, "\u2028\x0bb\n"), (4, "\ufeffc")]
    with pytest.raises(V2LError, match="line 1 is longer than 5 bytes"):
        list(read_lines(path, max_line_bytes=5))
    with pytest.raises(V2LError, match="larger than 10 bytes"):
        list(read_lines(path, max_bytes=10))


def test_a_torn_last_line_is_skipped(tmp_path):
    path = tmp_path / "file"
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": ')
    assert list(read_jsonl(path, torn=True)) == [(1, {"a": 1}), (3, {"a": 2})]
    with pytest.raises(V2LError, match="line 4"):
        list(read_jsonl(path))


# --- writing --------------------------------------------------------------------------------------


def test_json_is_written_whole_and_read_back(tmp_path):
    path = tmp_path / "new" / "record.json"
    value = {"name": "ä 😀", "rows": [1, None, 2.5]}
    write_json(path, value)
    assert read_json(path) == value
    assert path.read_text("utf-8").startswith('{\n  "name": "ä 😀"') and path.read_bytes()[-1] == 10
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"x": float("nan")}, allow_nan=False)
    write_json(path.with_name("nan.json"), float("nan"))
    assert path.with_name("nan.json").read_text() == "NaN\n"
    assert read_json(path) == value
    assert sorted(p.name for p in path.parent.iterdir()) == ["nan.json", "record.json"]


def test_json_lines_are_written_and_appended(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    write_jsonl(path, ({"step": step} for step in range(2)))
    append_jsonl(path, [{"step": 2}, {"text": "a\nb"}], fsync=True)
    assert [row for _, row in read_jsonl(path)] == [
        {"step": 0}, {"step": 1}, {"step": 2}, {"text": "a\nb"}
    ]  # fmt: skip
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(V2LError, match="cannot be written"):
        append_jsonl(tmp_path / "link", [1])
    with pytest.raises(V2LError, match="cannot be written"):
        append_jsonl(tmp_path / "none" / "log.jsonl", [1])
    assert len(path.read_text().splitlines()) == 4


def test_lone_surrogates_are_written_as_escapes(tmp_path):
    path = tmp_path / "log.jsonl"
    append_jsonl(path, [{"name": "a\udcff.mp4"}])
    assert path.read_text() == '{"name": "a\\udcff.mp4"}\n'


def test_appending_after_a_torn_line(tmp_path):
    path = tmp_path / "log.jsonl"
    append_jsonl(path, [1])
    with open(path, "a") as handle:
        handle.write('{"half')
    append_jsonl(path, [2])
    assert path.read_text() == '1\n{"half\n2\n'


@pytest.mark.parametrize(
    ("text", "whole"), [("1\n2\n", "1\n2\n"), ("1\n2", "1\n"), ("12", ""), ("", "")]
)
def test_a_torn_line_is_dropped(text, whole, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    drop_torn_line(path)
    assert path.read_text() == whole


def test_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert file_sha256(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()


# --- messages -------------------------------------------------------------------------------------


def test_messages_are_one_line_of_bounded_length():
    text = str(V2LError("file\n\x1b[2J\u202e\ud800 é 😀: " + "x" * 10_000_000 + "; do this"))
    assert len(text) < LINE_LENGTH + 100 and text.isprintable()
    assert text.startswith(r"file\n\x1b[2J\u202e\ud800 é 😀: xx") and text.endswith("; do this")
    assert str(ConfigError("short")) == "short"
    assert str(V2LError()) == ""


@pytest.mark.parametrize(
    "value",
    [
        "x" * 10_000_000,
        "\ud800" * 100,
        b"\x00" * 10_000_000,
        10**100_000,
        [["x" * 1000] * 1000] * 1000,
        {("x" * 1000): {"y": ["z"] * 1000}},
        float("nan"),
        None,
    ],
    ids=lambda value: type(value).__name__,
)
def test_excerpts_are_short_whatever_the_value(value):
    assert len(excerpt(value)) <= 80 and excerpt(value).isprintable()


def test_excerpts_of_short_values_are_their_repr():
    for value in ("x", 3, [1, "a"], {"a": None}):
        assert excerpt(value) == repr(value)


def test_deep_json_never_reaches_a_limit_of_python():
    """The error is the same however much of the stack the caller uses."""

    def recurse(levels: int) -> None:
        if levels:
            return recurse(levels - 1)
        with pytest.raises(V2LError, match="nested more than"):
            parse_json("[" * DEEP, "x")

    recurse(500)
    assert files.MAX_DEPTH == 64
