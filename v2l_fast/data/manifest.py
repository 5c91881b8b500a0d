"""JSONL manifests: one example per line, checked up front, grouped and split by video.

Fields, as the released code writes them: ``id``, ``video_path``, ``task_type``, ``prompt``,
``target_text``, ``dataset``, ``split``, ``metadata``. Two entries of the metadata have a meaning
here: ``span``, [start, end] in seconds, the part of the file the example is about (the whole file
when absent), and ``truncated``, true where the target stops before its end. The released
``clip_start_sec`` and ``clip_end_sec`` say where a clip that was already cut came from; they are
ignored.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from v2l_fast.errors import ListError, excerpt, one_line
from v2l_fast.files import parse_json, read_lines, write_jsonl

SPLITS = ("train", "val", "test")
TEXT_FIELDS = ("id", "video_path", "task_type", "prompt", "target_text")
# Problems that an error lists; it counts the rest.
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
    """A manifest cannot be used. The message lists its problems, one per line."""


def iter_rows(path: str | os.PathLike, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line with a JSON object; adds a problem for other lines.

    Raises:
        ManifestError: the file cannot be read, or has more than `_ENDED` problems.
    """
    for number, line in read_lines(path, ManifestError, missing="check the path of the manifest"):
        if not line.strip():
            continue
        if len(problems) >= _ENDED:
            raise listed(path, [*problems, f"line {number}: this and later lines are not read"])
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
    """The faults of a line's fields; the text fields `required` must be present."""
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
            expected = "a text" if kind is str else "an object"
            yield f"field {name!r} is {excerpt(row[name])}; write {expected} or leave it out"
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
    """The faults of the entries that have a meaning; the others are the user's."""
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
    """The error that lists `problems`."""
    first = "".join(f"\n  {one_line(problem)}" for problem in problems[:LISTED])
    rest = f"\n  and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return ManifestError(f"{one_line(str(path))}: {count}{first}{rest}")


@dataclass(frozen=True)
class Example:
    """One line of a manifest: a prompt about a video and its answer.

    Attributes:
        video_path: as written; `path` is the absolute path of the file.
        metadata: any further entries; see the module for those with a meaning.
    """

    id: str
    video_path: str
    path: str
    task_type: str
    prompt: str
    target_text: str
    dataset: str = "unknown"
    split: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def span(self) -> tuple[float, float] | None:
        """Start and end in seconds of the part it is about; None for the whole file."""
        span = self.metadata.get("span")
        return None if span is None else (float(span[0]), float(span[1]))

    @property
    def is_caption(self) -> bool:
        """Whether the answer describes the whole video, rather than answering a question."""
        return self.task_type.startswith(("caption", "summar", "describ"))

    def row(self, **changes: Any) -> dict[str, Any]:
        """The fields of the manifest line, with `changes`."""
        row = {
            "id": self.id,
            "video_path": self.video_path,
            "task_type": self.task_type,
            "prompt": self.prompt,
            "target_text": self.target_text,
            "dataset": self.dataset,
            "split": self.split,
            "metadata": dict(self.metadata),
        }
        return row | changes


@dataclass(frozen=True)
class VideoExamples:
    """A file, or a span of it, which is encoded once, and every example about it."""

    path: str
    span: tuple[float, float] | None
    examples: tuple[Example, ...]

    @property
    def name(self) -> str:
        """The path as written and the span in seconds, for logs and the quarantine."""
        written = self.examples[0].video_path
        return written if self.span is None else f"{written}#{self.span[0]:g}-{self.span[1]:g}"


def load_manifest(
    path: str | os.PathLike,
    root: str | os.PathLike | None = None,
    split: str | None = None,
    required: Sequence[str] = TEXT_FIELDS,
) -> list[Example]:
    """Read and check a whole manifest.

    Args:
        root: folder that relative video paths start from; the manifest's if omitted.
        split: return only the examples of this split (all are checked).
        required: text fields that must not be empty; a missing ``id`` is made from the
            line number, a missing ``task_type`` is "caption".

    Raises:
        ManifestError: the file cannot be read, or lines cannot be used; lists up to `LISTED`
            problems with line number, field and remedy.
    """
    path = Path(path)
    root = os.path.abspath(path.parent if root is None else root)
    problems: list[str] = []
    examples: list[Example] = []
    ids: dict[str, int] = {}
    missing: dict[str, str] = {}
    for number, row in iter_rows(path, problems):
        before = len(problems)
        problems += (f"line {number}: {what}" for what in islice(faults(row, required), LISTED))
        if len(problems) > before:
            continue
        example = _example(row, number, root)
        key = id_key(example.id)
        if key in ids:
            problems.append(
                f"line {number}: field 'id': {excerpt(example.id)} is line {ids[key]}'s too; "
                "ids must differ in more than case and Unicode form"
            )
        ids.setdefault(key, number)
        if example.path not in missing:
            missing[example.path] = _missing(example.path)
        if missing[example.path]:
            problems.append(f"line {number}: field 'video_path': {missing[example.path]}")
        examples.append(example)
    problems += _shared_videos(examples)
    if not examples and not problems:
        problems.append("it holds no example; write one JSON object per line")
    if problems:
        raise listed(path, problems)
    selected = [e for e in examples if split is None or e.split == split]
    if not selected:
        splits = ", ".join(sorted({str(e.split) for e in examples}))
        raise ManifestError(f"{path}: no example of split {split!r}, only of {splits}")
    return selected


def write_manifest(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a manifest atomically."""
    write_jsonl(path, map(dict, rows))


def group_by_video(examples: Iterable[Example]) -> list[VideoExamples]:
    """Group the examples about the same span of the same file, in order of first appearance."""
    groups: dict[tuple[str, tuple[float, float] | None], list[Example]] = {}
    for example in examples:
        groups.setdefault((example.path, example.span), []).append(example)
    return [VideoExamples(path, span, tuple(group)) for (path, span), group in groups.items()]


def split_by_video(
    examples: Sequence[Example], val_share: float, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """(training, validation) examples that share no video.

    If a line names a split, splits are as written ("val" and "test" are not trained on); otherwise
    a hash of each video decides, so that adding lines moves no video to the other part. The video
    is ``metadata["video_id"]`` if present (spans and re-encodings of one video then stay together),
    else the path as written; a file in several manifests is the video of its first line.
    """
    if any(example.split is not None for example in examples):
        return (
            [e for e in examples if e.split in ("train", None)],
            [e for e in examples if e.split == "val"],
        )
    train: list[Example] = []
    val: list[Example] = []
    keys: dict[str, str] = {}
    for example in examples:
        key = keys.setdefault(example.path, video_key(example))
        (val if video_share(key, seed) < val_share else train).append(example)
    return train, val


def video_key(example: Example) -> str:
    """A name of the video that does not depend on the data's location."""
    return str(example.metadata.get("video_id") or os.path.normpath(example.video_path))


def video_names(example: Example) -> tuple[str, ...]:
    """Names of an example's video; examples that share one are about the same video."""
    video_id = example.metadata.get("video_id")
    return (example.path, f"video_id {video_id}") if video_id else (example.path,)


def trained_on(train: Iterable[Example], val: Iterable[Example]) -> list[str]:
    """Files in `val` whose video is also in `train`."""
    known = {name for example in train for name in video_names(example)}
    return sorted({e.path for e in val if not known.isdisjoint(video_names(e))})


def video_share(key: str, seed: int) -> float:
    """A number in [0, 1) that depends only on the video and the seed."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _example(row: dict[str, Any], number: int, root: str) -> Example:
    written = row["video_path"]
    return Example(
        id=row.get("id") or f"line-{number}",
        video_path=written,
        path=os.path.normpath(os.path.join(root, written)),
        task_type=row.get("task_type") or "caption",
        prompt=row.get("prompt") or "",
        target_text=row.get("target_text") or "",
        dataset=row.get("dataset") or "unknown",
        split=row.get("split"),
        metadata=row.get("metadata") or {},
    )


def _missing(path: str) -> str:
    """The problem with the file of a video, or ""."""
    if os.path.isfile(path):
        return ""
    if os.path.exists(path):
        return f"{path} is not a regular file; name a video file"
    return f"no such file {path}; give the folder of the videos with --root, or remove the line"


def _shared_videos(examples: Sequence[Example]) -> Iterator[str]:
    """Problems of videos that are in two splits."""
    seen: dict[str, Example] = {}
    for example in examples:
        for name in video_names(example):
            first = seen.setdefault(name, example)
            if first.split != example.split:
                yield (
                    f"field 'split': {example.video_path} is in {first.split} "
                    f"(id {excerpt(first.id)}) and in {example.split} "
                    f"(id {excerpt(example.id)}); a video belongs to one split"
                )
                break
