"""Output for people: text as it is, tables, and progress on a terminal or in a log.

Names, questions and answers are data: nothing in them is markup, and none of their control
characters reaches the terminal. Outside a terminal, lines are never wrapped, and a long command
reports its progress as plain lines on standard error.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from rich.console import Console, ConsoleDimensions, HighlighterType, JustifyMethod, OverflowMethod
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.style import Style
from rich.table import Table
from rich.text import Text

from v2l_fast.errors import WriteError, escape_controls, os_error_reason

# Called with (stage, done, total).
Report = Callable[[str, int, int], None]

_UNSAFE_IN_JSON = re.compile(
    "[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
# A width in columns that no line reaches.
_UNBOUNDED = 1_000_000
# Seconds between two lines of progress outside a terminal, and before the first one, so that short
# work prints none.
_LINE_SECONDS = 15.0
_FIRST_SECONDS = 2.0


def printable(text: str, lines: bool = False) -> str:
    """Escape the characters that a terminal would act on, as ``\\x1b``.

    Args:
        lines: keep line breaks and tabs.
    """
    return escape_controls(text, keep="\n\t" if lines else "")


class PlainConsole(Console):
    """A rich console for text that is data: no markup, emoji codes or highlighting.

    Raises:
        WriteError: the stream is full or closed.
        BrokenPipeError: the reader of a pipe has closed it.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    @property
    def interactive(self) -> bool:
        """Whether the output is a terminal that can show a progress bar."""
        return _is_terminal(self.file) and not self.is_dumb_terminal

    @property  # type: ignore[misc]  # Console's setter is not used here.
    def size(self) -> ConsoleDimensions:
        if _is_terminal(self.file):
            return super().size
        return ConsoleDimensions(_UNBOUNDED, 25)

    def render_str(
        self,
        text: str,
        *,
        style: str | Style = "",
        justify: JustifyMethod | None = None,
        overflow: OverflowMethod | None = None,
        emoji: bool | None = None,
        markup: bool | None = None,
        highlight: bool | None = None,
        highlighter: HighlighterType | None = None,
    ) -> Text:
        return super().render_str(
            printable(text, lines=True),
            style=style, justify=justify, overflow=overflow, emoji=emoji, markup=markup,
            highlight=highlight, highlighter=highlighter,
        )  # fmt: skip

    def print(self, *objects: Any, **options: Any) -> None:
        with _console_errors(self):
            super().print(*objects, **options)

    def write_line(self, text: str) -> None:
        """Write one line without wrapping it or expanding tabs."""
        with _console_errors(self):
            self.file.write(text + "\n")
            self.file.flush()


out = PlainConsole()
log = PlainConsole(stderr=True)


def say(text: str) -> None:
    """Print one line on standard output, with its line breaks escaped."""
    out.write_line(printable(text))


def show(text: str) -> None:
    """Print several lines on standard output."""
    out.write_line(printable(text, lines=True))


def note(text: str, label: str = "") -> None:
    """Print one line on standard error, above any progress bar, after a colored ``label``."""
    style = {"error:": "bold red", "warning:": "yellow"}.get(label, "")
    line = Text(f"{label} " if label else "", style=style)
    line.append(printable(text), style="default" if label else "")
    log.print(line, soft_wrap=True)


class NoteHandler(logging.Handler):
    """Prints log records as notes, for a program that does not configure logging."""

    def emit(self, record: logging.LogRecord) -> None:
        label = "error:" if record.levelno >= logging.ERROR else "warning:"
        note(record.getMessage(), label)


def show_json(data: Any) -> None:
    """Print JSON on standard output."""
    # JSON itself escapes only the first 32 control characters.
    text = json.dumps(data, indent=2, ensure_ascii=False)
    out.write_line(_UNSAFE_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


def print_outcome(line: str, data: dict[str, Any], failures: Sequence[Any], as_json: bool) -> None:
    """Print a result and the videos that were left out, which do not make a command fail.

    Args:
        failures: dataclasses with a ``reason``.
    """
    if as_json:
        show_json(data | {"failures": [asdict(failure) for failure in failures]})
        return
    say(line)
    for failure in failures:
        note(f"left out: {failure.reason}")


def answer_text(text: str) -> str:
    """An answer for a table: as it is on a terminal, on one line elsewhere."""
    return text if _is_terminal(out.file) else printable(text)


def show_table(
    columns: Sequence[str], rows: Sequence[Sequence[str | Text]], title: str = ""
) -> None:
    """Print a table on standard output.

    If the terminal is too narrow for it, each row becomes a block of ``name  value`` lines.
    """
    table = Table(*columns, title=title or None)
    for cells in rows:
        table.add_row(*cells)
    needed = table.__rich_measure__(out, out.options.update(max_width=_UNBOUNDED)).maximum
    if needed <= out.width or _readable(columns, rows, out.width):
        out.print(table)
        return
    if title:
        show(title)
    width = max(map(len, columns))
    for cells in rows:
        for name, cell in zip(columns, cells, strict=True):
            name = name.replace("\n", " ")
            out.print(Text(f"{name:<{width}}  "), cell, sep="", soft_wrap=True)
        show("")


def _readable(columns: Sequence[str], rows: Sequence[Sequence[str | Text]], width: int) -> bool:
    """Whether a table of this width wraps its cells without breaking a word."""
    longest = [
        max((len(word) for cell in column for word in str(cell).split()), default=0)
        for column in zip(columns, *rows, strict=True)
    ]
    return sum(longest) + 3 * len(columns) + 1 <= width


# --- progress -------------------------------------------------------------------------------------


@contextmanager
def progress_bar(
    name: str,
    console: PlainConsole = log,
    first: float = _FIRST_SECONDS,
    seconds: float = _LINE_SECONDS,
) -> Iterator[Report]:
    """Show the progress of a task, which calls the yielded function with (stage, done, total).

    A terminal shows a bar. Elsewhere a line is printed after ``first`` seconds and then every
    ``seconds``, with or without a report in between.
    """
    name = printable(name)
    if not console.interactive:
        with _lines(name, console, first, seconds) as report:
            yield report
        return
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name, total=None)

        def report(stage: str, done: int, total: int) -> None:
            bar.update(task, description=f"{name}: {printable(stage)}", completed=done, total=total)

        yield report


@contextmanager
def _lines(name: str, console: PlainConsole, first: float, seconds: float) -> Iterator[Report]:
    began, done = time.monotonic(), threading.Event()
    state = "working"

    def report(stage: str, count: int, total: int) -> None:
        nonlocal state
        state = f"{printable(stage)} {count}/{total}"

    def speak() -> None:
        wait = first
        while not done.wait(wait):
            wait = seconds
            minutes, rest = divmod(round(time.monotonic() - began), 60)
            with suppress(OSError):
                console.write_line(f"{name}: {state}, {minutes}:{rest:02d} so far")

    speaker = threading.Thread(target=speak, name="progress", daemon=True)
    speaker.start()
    try:
        yield report
    finally:
        done.set()
        speaker.join()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Print ``what`` is being done: at once on a terminal, elsewhere only if it takes long."""
    if log.interactive:
        with log.status(Text(printable(what))):
            yield
        return
    timer = threading.Timer(_FIRST_SECONDS, log.write_line, [printable(what)])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# --- standard streams -----------------------------------------------------------------------------


def prepare_streams() -> None:
    """Make the standard streams safe to write to, whichever of them the caller closed.

    A character that the encoding lacks is escaped. Writing to a closed stream is an error; its
    descriptor is not reused for the next file that is opened.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def flush_output() -> None:
    """Flush standard output.

    Raises:
        WriteError: it is full or closed.
    """
    with _console_errors(out):
        out.file.flush()


def drop_output() -> None:
    """Discard pending output, so that the interpreter does not fail on it at exit."""
    try:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):
        pass


@contextmanager
def _console_errors(console: Console) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        # Not an error: `head` closes its input when it has enough.
        raise
    except WriteError:
        raise
    except OSError as error:
        stream = "standard error" if console.stderr else "standard output"
        line = f"{stream} cannot be written: {os_error_reason(error)}"
        raise WriteError(line, error) from None


def _is_terminal(file: Any) -> bool:
    try:
        return file.isatty()
    except (AttributeError, ValueError):
        return False
