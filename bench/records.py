"""Benchmark records on disk: one JSON file each, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def write(record: dict[str, Any], path: Path) -> None:
    """The record as indented JSON; an older file stays until the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    os.replace(part, path)
