"""Rows of a record as text, by column and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def columns(rows: Rows) -> dict[str, list[str]]:
    """Column name -> one text a row; nested fields become ``outer.inner``, an interval is one text.

    Rows may differ in fields; what a row lacks is "-".
    """
    flat = [dict(_fields(row)) for row in rows]
    names = dict.fromkeys(name for row in flat for name in row)
    return {name: [row.get(name, "-") for row in flat] for name in names}


def markdown(rows: Rows) -> str:
    """A Markdown table, numbers to the right."""
    found = columns(rows)
    lines = [list(found), ["---", *["---:"] * (len(found) - 1)]]
    lines += [list(cells) for cells in zip(*found.values(), strict=True)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def number(value: float) -> str:
    """Four significant digits, without an exponent where that is short."""
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def interval_text(interval: Mapping[str, float]) -> str:
    """Estimate and interval."""
    return "{estimate:.3f} [{low:.3f}, {high:.3f}]".format(**interval)


def _fields(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in row.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and set(value) == {"estimate", "low", "high"}:
            yield name, interval_text(value)
        elif isinstance(value, Mapping):
            yield from _fields(value, f"{name}.")
        elif isinstance(value, list):
            yield name, ", ".join(map(str, value)) or "-"
        elif isinstance(value, float):
            yield name, number(value)
        else:
            yield name, "-" if value is None else str(value)
