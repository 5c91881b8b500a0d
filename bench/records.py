"""Benchmark records on disk: one JSON file each, written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from v2l_fast.files import write_json

RESULTS = Path(__file__).resolve().parent / "results"


def write(record: dict[str, Any], path: Path) -> None:
    """The record as indented JSON; an older file stays until the new one is complete."""
    write_json(path, record, allow_nan=False)
