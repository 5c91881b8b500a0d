"""Running commands in this process, as a user types them."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from v2l_fast import cli, console


def run(*arguments: object, stdin: str | bytes | None = None) -> str:
    """Standard output of a command that succeeds."""
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], input=stdin)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


def fail(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    """Exit code and standard error of a command that fails, without lines of progress."""
    # They appear on a slow machine only.
    monkeypatch.setattr(console.log, "write_line", lambda text: None)
    monkeypatch.setattr(sys, "argv", ["v2l", *(str(a) for a in arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code, capsys.readouterr().err
