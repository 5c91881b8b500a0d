"""``v2l serve``: wrong options are reported before a model is loaded."""

from __future__ import annotations

import socket

import pytest

from tests.cli.commands import fail


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--port", "70000"], 2, "--port"),
        (["--max-batch", "0"], 2, "--max-batch"),
        (["--log-level", "loud"], 2, "debug, info, warning, error"),
        (["--dtype", "int4"], 2, "float32, bfloat16, float16"),
        (["--allowed-root", "nowhere"], 1, "no such folder"),
        (["--api-key-file", "nowhere"], 1, "write one key per line to it"),
        (["--api-key", "two words"], 1, "ASCII"),
        (["--host", "0.0.0.0", "--port", "0"], 1, "--allow-unauthenticated"),
        (["--host", "::", "--port", "0"], 1, "V2L_API_KEY"),
        (["--host", "no such host"], 1, "choose another address"),
        (["--allowed-host", "https://example.com"], 1, "without scheme and port"),
        (["--vllm-folder", __file__], 1, "is not a folder; name another one"),
        (["--vllm-folder", "/proc/x"], 1, "cannot be written"),
        (["--model", "nowhere"], 1, "nowhere: not a local path"),
    ],
)
def test_wrong_options(monkeypatch, capsys, tmp_path, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    exit_code, text = fail(monkeypatch, capsys, "serve", *arguments)
    assert exit_code == code and message in text.replace("│ ", ""), text


@pytest.mark.parametrize(
    "arguments",
    [["--api-key", "key", "--host", "0.0.0.0"], ["--host", "0.0.0.0", "--allow-unauthenticated"],
     ["--host", "127.0.0.2"], ["--host", "localhost"]],
)  # fmt: skip
def test_allowed_addresses(monkeypatch, capsys, tmp_path, arguments):
    """Only the model is missing."""
    monkeypatch.chdir(tmp_path)
    arguments = [*arguments, "--port", "0", "--model", "nowhere"]
    code, text = fail(monkeypatch, capsys, "serve", *arguments)
    assert code == 1 and text.startswith("error: nowhere"), text


def test_an_empty_key_file(monkeypatch, capsys, tmp_path):
    (tmp_path / "keys").write_text("# nothing yet\n\n")
    code, text = fail(monkeypatch, capsys, "serve", "--api-key-file", str(tmp_path / "keys"))
    assert code == 1 and "contains no key" in text


def test_a_port_that_is_taken(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, text = fail(monkeypatch, capsys, "serve", "--port", str(taken.getsockname()[1]))
    assert code == 1 and "Address already in use; choose another address" in text
