"""JSON and JSON-lines files of a run: whole or absent, and cut back to a step on resume."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from v2l_fast import files
from v2l_fast.errors import V2LError
from v2l_fast.files import parse_json
from v2l_fast.outputs import append_text, write_text


class _TornLine(V2LError):
    """A line that a crash has cut short."""


def write_record(path: str | Path, record: Any) -> None:
    """Write a JSON file atomically; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=2) + "\n")


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add an object in one write at the end of the file, which other processes may share."""
    append_text(path, json.dumps(line) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file, none if there is no file; a line cut by a crash ends it."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        with suppress(_TornLine):
            for number, line in files.read_lines(path):
                lines.append(parse_json(line, f"line {number}", _TornLine, allow_nan=True))
    return lines


def cut_lines(path: Path, step: int) -> None:
    """Keep the lines up to `step`; a resumed run writes the later ones again."""
    kept = [line for line in read_lines(path) if line["step"] <= step]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    if path.is_file() and files.read_text(path, files.LINES_BYTES) != text:
        write_text(path, text)
