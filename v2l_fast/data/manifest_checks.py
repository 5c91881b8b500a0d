"""What can be wrong with a line of a manifest, said with line number, field and remedy."""

from __future__ import annotations

import difflib
import math
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from v2l_fast.errors import ListError, excerpt, one_line
from v2l_fast.files import parse_json, read_lines

SPLITS = ("train", "val", "test")
TEXT_FIELDS = ("id", "video_path", "task_type", "prompt", "target_text")
# Problems listed before the rest is only counted.
LISTED = 20
# Problems after which the rest of the file is not read.
_ENDED = 10_000

_OPTIONAL = {"dataset": str, "split": str, "metadata": dict}
_IGNORED = ("clip_start_sec", "clip_end_sec")
_FIELDS = (*TEXT_FIELDS, *_OPTIONAL, *_IGNORED)
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_ID_RULE = (
    "write at most 255 bytes without control characters, backslashes, spaces at the ends, "
    "or '.', '..' or nothing between slashes"
)


class ManifestError(ListError, ValueError):
    """A manifest cannot be used. The message lists its problems, one a line."""


def rows(path: str | os.PathLike, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that holds one; a problem is added for others.

    Raises:
        ManifestError: the file cannot be read, or has more than `_ENDED` problems.
    """
    for number, line in read_lines(path, ManifestError, missing="check the path of the manifest"):
        if not line.strip():
            continue
        if len(problems) >= _ENDED:
            raise listed(path, [*problems, f"line {number}: and those after it are not read"])
        try:
            row = parse_json(line, f"line {number}", ManifestError, remedy="correct the line")
        except ManifestError as error:
            problems.append(str(error))
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            problems.append(f"line {number}: a JSON {type(row).__name__}; write an object, {{...}}")


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
            yield f"field {name!r} is {excerpt(value)}; write a text"
        elif name in required and not value.strip():
            yield f"field {name!r} is blank; give it a text"
        elif name == "id" and not is_id(value):
            yield f"field 'id' is {excerpt(value)}; {_ID_RULE}"
        elif name == "video_path" and _UNPRINTABLE.search(value):
            yield f"field 'video_path' is {excerpt(value)}; write a path without control characters"
    for name, kind in _OPTIONAL.items():
        if row.get(name) is not None and not isinstance(row[name], kind):
            wanted = "a text" if kind is str else "an object"
            yield f"field {name!r} is {excerpt(row[name])}; write {wanted} or leave it out"
    for name in _IGNORED:
        if row.get(name) is not None and not _is_number(row[name]):
            yield f"field {name!r} is {excerpt(row[name])}; write a number or leave it out"
    if isinstance(row.get("split"), str) and row["split"] not in SPLITS:
        yield f"field 'split' is {excerpt(row['split'])}; write {', '.join(SPLITS)} or leave it out"
    if isinstance(row.get("metadata"), dict):
        yield from _metadata_faults(row["metadata"])
    for name in row:
        if name not in _FIELDS:
            near = difflib.get_close_matches(name[:80], _FIELDS, 1)
            hint = f"did you mean {near[0]!r}?" if near else "put it under 'metadata'"
            yield f"field {excerpt(name)} is unknown; {hint}"


def _metadata_faults(metadata: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the entries that have a meaning; the others are the user's."""
    span, video, truncated = (metadata.get(k) for k in ("span", "video_id", "truncated"))
    if not _is_span(span):
        yield (
            f"field 'metadata.span' is {excerpt(span)}; write [start, end] in seconds, "
            "0 <= start < end"
        )
    if video is not None and not isinstance(video, str) and type(video) is not int:
        yield f"field 'metadata.video_id' is {excerpt(video)}; write a text or leave it out"
    if truncated is not None and not isinstance(truncated, bool):
        yield f"field 'metadata.truncated' is {excerpt(truncated)}; write true or false"


def is_id(text: str) -> bool:
    """Whether a text can name an example: also a relative path that leads nowhere else.

    Answers, records and other tools name files by ids. At most 255 bytes of UTF-8, parts between
    slashes not empty, ``.`` or ``..``, no backslash or control character, no space at either end.
    """
    return (
        0 < len(text) <= 255
        and len(text.encode("utf-8", "replace")) <= 255
        and not _UNPRINTABLE.search(text)
        and "\\" not in text
        and text == text.strip()
        and not any(part in ("", ".", "..") for part in text.split("/"))
    )


def id_key(text: str) -> str:
    """The same for ids that look the same, or are the same on file systems that fold case."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def _is_span(span: Any) -> bool:
    if span is None:
        return True
    if not isinstance(span, list) or len(span) != 2:
        return False
    if not all(map(_is_number, span)):
        return False
    return 0 <= span[0] < span[1] < math.inf


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def listed(path: str | os.PathLike, problems: list[str]) -> ManifestError:
    """The error that lists them."""
    first = "".join(f"\n  {one_line(problem)}" for problem in problems[:LISTED])
    rest = f"\n  and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return ManifestError(f"{one_line(str(path))}: {count}{first}{rest}")
