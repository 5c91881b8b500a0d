"""Benchmark records on disk: one JSON file each, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from v2l_fast.outputs import write_text

RESULTS = Path(__file__).resolve().parent / "results"


def write(record: dict[str, Any], path: Path) -> None:
    """The record as indented JSON; an older file stays until the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=2, allow_nan=False) + "\n")
