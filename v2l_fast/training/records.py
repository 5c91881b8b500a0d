"""JSON and JSON-lines files of a run: whole or absent, and cut back to a step on resume."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from v2l_fast.files import write_text


def write_record(path: str | Path, record: Any) -> None:
    """Write a JSON file atomically; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=2) + "\n")


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add an object in one write at the end of the file, which other processes may share."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (json.dumps(line) + "\n").encode())
    finally:
        os.close(handle)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file, none if there is no file; a line cut by a crash ends it."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def cut_lines(path: Path, step: int) -> None:
    """Keep the lines up to `step`; a resumed run writes the later ones again."""
    kept = [line for line in read_lines(path) if line["step"] <= step]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    if path.is_file() and path.read_text() != text:
        write_text(path, text)
