"""Rows of a record as text columns, as a Markdown table and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from v2l_fast.files import write_text

Rows = Sequence[Mapping[str, Any]]

_INTERVAL = {"estimate", "low", "high"}


def columns(rows: Rows) -> dict[str, list[str]]:
    """Column name -> one text per row; nested fields become ``outer.inner``, an interval is one
    text.

    Rows may differ in their fields; a missing field is "-".
    """
    flat = [{name: _text(value) for name, value in _flatten(row, _INTERVAL)} for row in rows]
    names = dict.fromkeys(name for row in flat for name in row)
    return {name: [row.get(name, "-") for row in flat] for name in names}


def markdown(rows: Rows) -> str:
    """A Markdown table; every column but the first is aligned right."""
    by_name = columns(rows)
    lines = [list(by_name), ["---", *["---:"] * (len(by_name) - 1)]]
    lines += [list(cells) for cells in zip(*by_name.values(), strict=True)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write_csv(path: Path, rows: Rows) -> None:
    """Write the rows with the union of their columns; nested fields become ``outer.inner``.

    Raises:
        WriteError: the file cannot be written.
    """
    flat = [dict(_flatten(row)) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in flat for name in row)))
    writer.writeheader()
    for row in flat:
        writer.writerow(
            {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()}
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())


def interval_text(interval: Mapping[str, float]) -> str:
    """``estimate [low, high]`` with three decimals."""
    return "{estimate:.3f} [{low:.3f}, {high:.3f}]".format(**interval)


def number_text(value: float) -> str:
    """Four significant digits; an integer from 10,000 on."""
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _flatten(
    row: Mapping[str, Any], atom: set[str] | None = None, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """The row's fields with nested mappings unfolded, except those whose keys are ``atom``."""
    for key, value in row.items():
        if isinstance(value, Mapping) and set(value) != atom:
            yield from _flatten(value, atom, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    match value:
        case Mapping():
            return interval_text(value)
        case list():
            return ", ".join(map(str, value)) or "-"
        case float():
            return number_text(value)
        case None:
            return "-"
    return str(value)
