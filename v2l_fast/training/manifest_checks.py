"""What can be wrong with a line of a manifest, said with line number, field and remedy."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from v2l_fast.errors import ListError

SPLITS = ("train", "val", "test")
TEXT_FIELDS = ("id", "video_path", "task_type", "prompt", "target_text")
# Problems listed before the rest is only counted.
LISTED = 20

_OPTIONAL = {"dataset": str, "split": str, "metadata": dict}
_IGNORED = ("clip_start_sec", "clip_end_sec")
_FIELDS = (*TEXT_FIELDS, *_OPTIONAL, *_IGNORED)


class ManifestError(ListError, ValueError):
    """A manifest cannot be used. The message lists its problems, one a line."""


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of every line that is not blank.

    Raises ManifestError when the file cannot be read.
    """
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None


def parse(line: str, number: int, problems: list[str]) -> dict[str, Any] | None:
    """The line's object, or None with a problem added."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        problems.append(f"line {number}: not JSON ({error.msg} at column {error.colno})")
        return None
    if not isinstance(row, dict):
        problems.append(f"line {number}: a JSON {type(row).__name__}; write an object, {{...}}")
        return None
    return row


def faults(row: dict[str, Any], required: Sequence[str]) -> Iterator[str]:
    """What is wrong with a line's fields, of which the text fields `required` must be there."""
    for name in TEXT_FIELDS:
        value = row.get(name)
        if value is None or value == "":
            if name in required:
                hint = "give it a text"
                if name == "target_text":
                    hint += ", or let v2l teach write the answers"
                yield f"field {name!r} is missing or empty; {hint}"
        elif not isinstance(value, str):
            yield f"field {name!r} is {value!r}; write a text"
        elif name in required and not value.strip():
            yield f"field {name!r} is blank; give it a text"
    for name, kind in _OPTIONAL.items():
        if row.get(name) is not None and not isinstance(row[name], kind):
            wanted = "a text" if kind is str else "an object"
            yield f"field {name!r} is {row[name]!r}; write {wanted} or leave it out"
    if isinstance(row.get("split"), str) and row["split"] not in SPLITS:
        yield f"field 'split' is {row['split']!r}; write {', '.join(SPLITS)} or leave it out"
    if isinstance(row.get("metadata"), dict) and not _is_span(row["metadata"].get("span")):
        yield (
            f"field 'metadata.span' is {row['metadata']['span']!r}; write [start, end] in seconds, "
            "0 <= start < end"
        )
    for name in row:
        if name not in _FIELDS:
            near = difflib.get_close_matches(name, _FIELDS, 1)
            hint = f"did you mean {near[0]!r}?" if near else "put it under 'metadata'"
            yield f"field {name!r} is unknown; {hint}"


def _is_span(span: Any) -> bool:
    if span is None:
        return True
    if not isinstance(span, list) or len(span) != 2:
        return False
    if any(isinstance(x, bool) or not isinstance(x, int | float) for x in span):
        return False
    return 0 <= span[0] < span[1] < math.inf


def listed(path: Path, problems: list[str]) -> ManifestError:
    """The error that lists them."""
    first = "".join(f"\n  {problem}" for problem in problems[:LISTED])
    rest = f"\n  and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return ManifestError(f"{path}: {count}{first}{rest}")
