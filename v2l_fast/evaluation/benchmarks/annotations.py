"""Reading annotation files: JSON, JSON lines, CSV and their fields.

Responsible for errors that name the file, the position in it and the remedy. The meaning of the
fields is `formats`'s.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from v2l_fast import files
from v2l_fast.errors import V2LError

_AGAIN = "download it again"
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")


class BenchmarkError(V2LError, ValueError):
    """An annotation file or a video of a benchmark is missing, or not as published."""


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises BenchmarkError."""
    return files.read_json(path, files.LARGE_BYTES, BenchmarkError, remedy=_AGAIN)


def read_mapping(path: Path) -> Mapping[str, Any]:
    """The object of a JSON file. Raises BenchmarkError."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise BenchmarkError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def read_list(path: Path) -> Iterator[tuple[str, Any]]:
    """("entry N", row) for each element of a JSON list. Raises BenchmarkError."""
    value = read_json(path)
    if not isinstance(value, list):
        raise BenchmarkError(f"{path}: must hold a JSON list, got {type(value).__name__}")
    for number, row in enumerate(value, start=1):
        yield f"entry {number}", row


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """("line N", row) for each row of a JSON-lines file. Raises BenchmarkError."""
    for number, row in files.read_jsonl(path, BenchmarkError, remedy=_AGAIN):
        yield f"line {number}", row


def read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    """("line N", row) for each row of a CSV file with a header. Raises BenchmarkError."""
    reader = csv.DictReader(line for _, line in files.read_lines(path, BenchmarkError))
    try:
        for number, row in enumerate(reader, start=2):
            yield f"line {number}", row
    except csv.Error as error:
        raise BenchmarkError(
            f"{path}: line {reader.line_num} is not CSV ({error}); {_AGAIN}"
        ) from None


def get(path: Path, where: str, row: Any, name: str) -> Any:
    """The value of a field that every row must have, not empty. Raises BenchmarkError."""
    value = row.get(name) if isinstance(row, dict) else None
    if value is None or value == "":
        raise BenchmarkError(
            f"{path}: {where} has no {name!r}; check that it is the published file"
        )
    return value


def stem(name: str) -> str:
    """A video's name without folder and video suffix ("a.b" is not a suffix)."""
    path = Path(name)
    return path.stem if path.suffix.lower() in VIDEO_SUFFIXES else path.name
