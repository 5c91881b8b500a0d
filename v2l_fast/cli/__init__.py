"""The command line ``v2l``: one app of all commands, and errors as one line.

Each group of commands is a module. A command parses, calls the library and prints. Exit codes: 0
success, 1 failure (one line states the problem and the remedy), 2 wrong usage, 130 interrupted.

Without ``--force`` a command never replaces an existing file or folder, and it never replaces its
own input. Folders of long runs (stores, evaluations, sweeps, training) are continued instead.
"""

from __future__ import annotations

import logging
import sys

import typer
from typer import Option

import v2l_fast
from v2l_fast.cli import (
    adapters,
    converse,
    evaluate,
    install,
    serve,
    shapes,
    training,
)
from v2l_fast.cli.options import CONTEXT
from v2l_fast.console import NoteHandler, drop_output, flush_output, note, prepare_streams, say
from v2l_fast.errors import V2LError, excerpt, os_error_reason

app = typer.Typer(
    name="v2l",
    help="Turn videos into LoRA adapters and ask a frozen VLM about them without visual tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT,
)
for panel, commands in {
    "Adapters": (adapters.internalize, adapters.ask, converse.chat, adapters.compose),
    "Export and serving": (serve.convert, serve.export, serve.push, serve.serve),
    "Training": (training.train, training.transcode, training.teach, training.cache),
    "Evaluation": (evaluate.evaluate, evaluate.manifest, evaluate.sweep),
    "Installation": (install.demo, install.doctor),
}.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.add_typer(converse.persona_app, name="persona", rich_help_panel="Adapters")
app.add_typer(converse.cper_app, name="cper", rich_help_panel="Evaluation")
app.add_typer(evaluate.analyze_app, name="analyze", rich_help_panel="Evaluation")
app.add_typer(shapes.app, name="shapes", rich_help_panel="Evaluation")
app.add_typer(training.finevideo_app, name="finevideo", rich_help_panel="Training")

# The base class of typer's usage errors.
UsageError = typer.BadParameter.__base__


@app.callback(invoke_without_command=True)
def root(version: bool = Option(False, "--version", help="Print the version.")) -> None:
    """Turn videos into LoRA adapters and ask a frozen VLM about them without visual tokens."""
    if version:
        say(v2l_fast.__version__)
        raise typer.Exit


def main() -> None:
    """Run ``v2l`` or ``python -m v2l_fast`` and exit."""
    prepare_streams()
    # Names in warnings are data, too.
    logging.lastResort = NoteHandler(logging.WARNING)
    code = 1
    try:
        code = app(standalone_mode=False) or 0
        flush_output()
    except UsageError as error:
        code = _report_usage_error(error)
    except BrokenPipeError:
        # The reader has what it wanted, as `head` does.
        drop_output()
    except V2LError as error:
        note(str(error), "error:")
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        note(f"{where}{os_error_reason(error)}", "error:")
    except ModuleNotFoundError as error:
        hint = install.remedy(error.name or "")
        if hint is None:
            raise
        note(f"{error.name} is not installed: {hint}", "error:")
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:
        note("interrupted")
    try:
        flush_output()
    except (V2LError, OSError):
        drop_output()
    sys.exit(code)


def _report_usage_error(error: Exception) -> int:
    """Print what is wrong with the command line; return the exit code."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        # Its message is the help, which has been printed.
        return error.exit_code
    if context is not None:
        for line in context.get_usage().splitlines():
            note(line)
        note(f"Try '{context.command_path} --help' for help.")
    message = error.format_message()
    # Pydantic refuses a value of the wrong type or size, and its message does not repeat it.
    if (refusal := getattr(error.__cause__, "errors", None)) is not None:
        message += f", got {excerpt(refusal()[0]['input'])}"
    note(message, "error:")
    return error.exit_code
