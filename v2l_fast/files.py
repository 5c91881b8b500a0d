"""Bounded reads of files that users name. What is written is ``outputs``'.

Errors name the file, the fault and the remedy.
"""

from __future__ import annotations

import codecs
import errno
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO

from v2l_fast.errors import V2LError, excerpt

# Largest files read whole: configurations and records; data that others publish.
SMALL_BYTES = 16 * 2**20
LARGE_BYTES = 2**30
# Longest line of a text file, and largest file that is read line by line.
LINE_BYTES = 16 * 2**20
LINES_BYTES = 8 * 2**30
# Deepest nesting of JSON values.
MAX_DEPTH = 64

# Windows has neither; its named pipes and devices are not found in folders.
NONBLOCK = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISLNK, "a symbolic link"),
)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


# --- reading --------------------------------------------------------------------------------------
#
# Every file a user names is opened here: a regular file, of bounded size, read at most up to that
# bound even when it grows meanwhile. What waits for a writer (a named pipe) or never ends (a
# device) is refused without waiting.


def open_regular(
    path: str | os.PathLike,
    error: type[V2LError] = V2LError,
    *,
    follow: bool = True,
    missing: str = "check the path",
) -> BinaryIO:
    """Open a regular file for reading, in binary.

    Args:
        error: class of the error raised.
        follow: whether a symbolic link in the last component is followed.
        missing: the remedy when there is no such file.

    Raises:
        error: the path names no file, something other than a regular file, or a file that cannot
            be read. An OSError is its ``__context__``.
    """
    flags = os.O_RDONLY | NONBLOCK | (0 if follow else NOFOLLOW)
    try:
        # Looked at before it is opened, since opening can act on a device or wake a pipe's writer,
        # and again on the open file, which nothing can exchange.
        refuse_special(path, (os.stat if follow else os.lstat)(path).st_mode, error)
        descriptor = os.open(path, flags)
        try:
            refuse_special(path, os.fstat(descriptor).st_mode, error)
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise
    except V2LError:
        raise
    except FileNotFoundError:
        raise error(f"{path}: no such file; {missing}") from None
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror}); {_remedy(cause)}") from None
    except ValueError:
        # A NUL byte, or characters that the file system's encoding lacks.
        raise error(f"{path}: not a path; check the characters in it") from None


def read_bytes(
    path: str | os.PathLike,
    max_bytes: int = SMALL_BYTES,
    error: type[V2LError] = V2LError,
    *,
    missing: str = "check the path",
) -> bytes:
    """The whole of a regular file.

    Raises:
        error: as :func:`open_regular`, or the file is larger than `max_bytes`.
    """
    with open_regular(path, error, missing=missing) as handle:
        try:
            data = handle.read(max_bytes + 1)
        except OSError as cause:
            raise error(f"{path}: cannot be read ({cause.strerror}); {_remedy(cause)}") from None
    if len(data) > max_bytes:
        raise error(
            f"{path}: larger than {max_bytes:,} bytes, the limit for this kind of file; "
            "check that it is the right file"
        )
    return data


def read_text(
    path: str | os.PathLike,
    max_bytes: int = SMALL_BYTES,
    error: type[V2LError] = V2LError,
    *,
    missing: str = "check the path",
) -> str:
    """The whole of a UTF-8 text file, with or without a byte order mark.

    Raises:
        error: as :func:`read_bytes`, or the file is not UTF-8.
    """
    data = read_bytes(path, max_bytes, error, missing=missing)
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as cause:
        line = data.count(b"\n", 0, cause.start) + 1
        raise error(f"{path}: line {line} is not UTF-8 text; save the file as UTF-8") from None


def read_json(
    path: str | os.PathLike,
    max_bytes: int = SMALL_BYTES,
    error: type[V2LError] = V2LError,
    *,
    kind: type[dict] | type[list] | None = None,
    missing: str = "check the path",
    remedy: str = "correct the file",
    allow_nan: bool = False,
) -> Any:
    """The value of a JSON file, within the bounds of :func:`parse_json`.

    Args:
        kind: ``dict`` or ``list`` where only an object or a list will do.
        missing: the remedy when there is no such file.
        remedy: the remedy when the content is wrong.

    Raises:
        error: as :func:`read_text` and :func:`parse_json`, or the value is not of `kind`.
    """
    value = parse_json(
        read_text(path, max_bytes, error, missing=missing),
        str(path),
        error,
        remedy=remedy,
        allow_nan=allow_nan,
    )
    if kind is not None and not isinstance(value, kind):
        wanted = "object" if kind is dict else "list"
        raise error(f"{path}: must hold a JSON {wanted}, got {excerpt(value)}; {remedy}")
    return value


def read_lines(
    path: str | os.PathLike,
    error: type[V2LError] = V2LError,
    *,
    missing: str = "check the path",
    max_line_bytes: int = LINE_BYTES,
    max_bytes: int = LINES_BYTES,
) -> Iterator[tuple[int, str]]:
    """(number from 1, text with its line break) of every line of a UTF-8 text file, lazily.

    Raises:
        error: as :func:`open_regular`; a line or the file is too long, or a line is not UTF-8.
    """
    total = 0
    with open_regular(path, error, missing=missing) as handle:
        for number in itertools.count(1):
            try:
                line = handle.readline(max_line_bytes + 1)
            except OSError as cause:
                raise error(
                    f"{path}: cannot be read ({cause.strerror}); {_remedy(cause)}"
                ) from None
            if not line:
                return
            total += len(line)
            if len(line) > max_line_bytes:
                raise error(
                    f"{path}: line {number} is longer than {max_line_bytes:,} bytes; "
                    "check that it is the right file"
                )
            if total > max_bytes:
                raise error(f"{path}: larger than {max_bytes:,} bytes; split the file")
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError:
                raise error(
                    f"{path}: line {number} is not UTF-8 text; save the file as UTF-8"
                ) from None
            yield number, text


def read_jsonl(
    path: str | os.PathLike,
    error: type[V2LError] = V2LError,
    *,
    missing: str = "check the path",
    remedy: str = "correct the line",
    allow_nan: bool = False,
    torn: bool = False,
) -> Iterator[tuple[int, Any]]:
    """(line number, value) of every line of a JSON-lines file that is not blank, lazily.

    Args:
        torn: a last line without a line break, which a crash has cut short, is left out.

    Raises:
        error: as :func:`read_lines` and :func:`parse_json`.
    """
    for number, line in read_lines(path, error, missing=missing):
        if not line.strip() or (torn and not line.endswith("\n")):
            continue
        where = f"{path}: line {number}"
        yield number, parse_json(line, where, error, remedy=remedy, allow_nan=allow_nan)


def parse_json(
    text: str,
    where: str,
    error: type[V2LError] = V2LError,
    *,
    remedy: str = "correct the file",
    allow_nan: bool = False,
) -> Any:
    """A JSON value that the rest of the program can use without surprises.

    Args:
        where: names the text in errors, as "FILE" or "FILE: line 3".
        allow_nan: whether NaN and infinite numbers are accepted.

    Raises:
        error: the text is not JSON, is nested more than `MAX_DEPTH` deep, holds an integer of more
            than 64 bits, a number that is not finite, a key twice in one object, or half of a
            surrogate pair, which no file or terminal can take.
    """
    try:
        value = (_LENIENT if allow_nan else _STRICT).decode(text)
        _refuse_depth(value)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise error(f"{where}: nested more than {MAX_DEPTH} levels deep; {remedy}") from None
    except UnicodeEncodeError as cause:
        near = excerpt(cause.object[max(0, cause.start - 20) : cause.end + 20])
        raise error(f"{where}: holds half of a surrogate pair, near {near}; {remedy}") from None
    except json.JSONDecodeError as cause:
        # Of JSON lines, `where` names the line already.
        place = f"line {cause.lineno}, column {cause.colno}"
        if text.find("\n") in (-1, len(text) - 1):
            place = f"column {cause.colno}"
        near = excerpt(text[cause.pos : cause.pos + 40])
        raise error(f"{where}: not JSON ({cause.msg} at {place}, near {near}); {remedy}") from None
    except _RefusedValue as cause:
        raise error(f"{where}: {cause}; {remedy}") from None
    return value


class _RefusedValue(ValueError):
    """A JSON value that parses but is not accepted; the message says why."""


def refuse_special(path: str | os.PathLike, mode: int, error: type[V2LError]) -> None:
    if stat.S_ISREG(mode):
        return
    kind = next((name for test, name in _KINDS if test(mode)), "not a regular file")
    raise error(f"{path}: {kind}, not a regular file; name a file")


def _remedy(cause: OSError) -> str:
    if cause.errno in (errno.EMFILE, errno.ENFILE):
        return "close files or raise the limit (ulimit -n)"
    return "check the path and its permissions"


def _integer(digits: str) -> int:
    # Longer texts are not handed to int, which takes quadratic time and has a limit of its own.
    if len(digits) <= 20 and -(2**63) <= (value := int(digits)) < 2**63:
        return value
    raise _RefusedValue(f"the integer {excerpt(digits)[1:-1]} does not fit 64 bits")


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _RefusedValue(f"the number {excerpt(text)[1:-1]} is not finite")
    return value


def _constant(name: str) -> Any:
    raise _RefusedValue(f"{name} is not a finite number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _RefusedValue(f"the key {excerpt(twice)} appears twice in one object")
    return value


_STRICT = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_number, parse_constant=_constant
)
_LENIENT = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)


def _refuse_depth(value: Any) -> None:
    """Raise RecursionError where Python itself would not yet."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for outer in level
            if type(outer) in (dict, list)
            for item in (outer.values() if type(outer) is dict else outer)
            if type(item) in (dict, list)
        ]
        if not level:
            return
    raise RecursionError
