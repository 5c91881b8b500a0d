"""Dataclasses of options on commands."""

from __future__ import annotations

import re

import pytest
import typer
from typer.testing import CliRunner

from v2l_fast.cli.options import FORCE, options, with_options
from v2l_fast.video.reader import BACKENDS


@options("Sizes")
class SizeOptions:
    """A group with a required and an optional field."""

    width: int = typer.Option(..., min=1, help="Width in pixels.")
    height: int = typer.Option(7, "--height", "-H", min=1, help="Height in pixels.")


@options("More sizes")
class DeepSizeOptions(SizeOptions):
    """A group that inherits fields."""

    depth: int | None = typer.Option(None, help="Depth in pixels.")


app = typer.Typer()
calls: list[tuple] = []


@app.command()
@with_options
def measure(
    size: DeepSizeOptions, name: str = typer.Argument(..., help="Name."), force: bool = FORCE
) -> None:
    """Measure a box."""
    calls.append((size, name, force))


def test_options_become_a_dataclass():
    result = CliRunner().invoke(app, ["box", "--width", "3", "-H", "4", "--force"])
    assert result.exit_code == 0, result.output
    assert calls.pop() == (DeepSizeOptions(width=3, height=4, depth=None), "box", True)


def test_a_command_is_also_a_function():
    measure(name="box", width=3)
    size, name, force = calls.pop()
    assert (size, name, force) == (DeepSizeOptions(width=3), "box", False) and size.height == 7
    with pytest.raises(AttributeError):
        size.height = 8


def test_help_has_a_panel_for_each_group():
    text = CliRunner().invoke(app, ["--help"]).stdout
    assert "Measure a box." in text
    panels = re.findall(r"─ ([A-Z][a-z ]+) ─", text)
    assert panels == ["Arguments", "Options", "Sizes", "More sizes"]
    assert text.index("Sizes") < text.index("--height") < text.index("--depth")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["box"], "--width"), (["box", "--width", "0"], "--width"), ([], "name")],
)
def test_wrong_usage(arguments, words):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and words in result.stderr.lower()


def test_decoders_are_those_of_the_library():
    from tests.cli.commands import run

    help_text = " ".join(run("internalize", "--help").replace("│", " ").split())
    assert set(re.findall(r"auto|pyav|torchcodec|dali", help_text)) == set(BACKENDS) | {"auto"}
