"""Text, JSON and JSON-lines files: bounded reads, and writes that leave a whole file or none.

Errors name the file, the problem and the remedy. ``outputs`` decides which files a command may
write.
"""

from __future__ import annotations

import codecs
import errno
import hashlib
import itertools
import json
import math
import mmap
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from v2l_fast.errors import V2LError, WriteError, excerpt, os_error_reason

# Maximum size of a file that is read whole: configurations and records; published data.
SMALL_BYTES = 16 * 2**20
LARGE_BYTES = 2**30
# Maximum size of a line, and of a file that is read line by line.
LINE_BYTES = 16 * 2**20
LINES_BYTES = 8 * 2**30
# Maximum nesting of JSON values.
MAX_DEPTH = 64

# Windows has neither; its named pipes and devices are not found in folders.
_NONBLOCK = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
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
# Every file that a user names is opened here. It must be a regular file, and at most a fixed number
# of bytes is read, even if the file grows while it is read. A named pipe, whose writer may never
# open it, or a device, which may never end, is refused without waiting.


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
        missing: the remedy if the file does not exist.

    Raises:
        error: the path does not exist, is not a regular file, or cannot be read. An OSError is its
            ``__context__``.
    """
    flags = os.O_RDONLY | _NONBLOCK | (0 if follow else _NOFOLLOW)
    try:
        with _read_errors(path, error):
            # Checked before it is opened, because opening can act on a device or wake a pipe's
            # writer, and again on the open file, which nothing can exchange.
            _refuse_special(path, (os.stat if follow else os.lstat)(path).st_mode, error)
            descriptor = os.open(path, flags)
            try:
                _refuse_special(path, os.fstat(descriptor).st_mode, error)
                return os.fdopen(descriptor, "rb")
            except BaseException:
                os.close(descriptor)
                raise
    except FileNotFoundError:
        raise error(f"{path}: no such file; {missing}") from None
    except V2LError:
        raise
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
    """The content of a regular file.

    Raises:
        error: as :func:`open_regular`, or the file is larger than `max_bytes`.
    """
    with open_regular(path, error, missing=missing) as handle, _read_errors(path, error):
        data = handle.read(max_bytes + 1)
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
    """The content of a UTF-8 text file, without its byte order mark.

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
        kind: ``dict`` or ``list``, to accept only an object or a list.
        missing: the remedy if the file does not exist.
        remedy: the remedy if the content is wrong.

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
        name = "object" if kind is dict else "list"
        raise error(f"{path}: must hold a JSON {name}, got {excerpt(value)}; {remedy}")
    return value


def read_lines(
    path: str | os.PathLike,
    error: type[V2LError] = V2LError,
    *,
    missing: str = "check the path",
    max_line_bytes: int = LINE_BYTES,
    max_bytes: int = LINES_BYTES,
) -> Iterator[tuple[int, str]]:
    """Lazily yield (number from 1, text with its line break) for every line of a UTF-8 text file.

    Raises:
        error: as :func:`open_regular`, or a line or the file is too long, or a line is not UTF-8.
    """
    total = 0
    with open_regular(path, error, missing=missing) as handle, _read_errors(path, error):
        for number in itertools.count(1):
            line = handle.readline(max_line_bytes + 1)
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
    remedy: str = "correct the line",
    allow_nan: bool = False,
    torn: bool = False,
) -> Iterator[tuple[int, Any]]:
    """Lazily yield (line number, value) for every line of a JSON-lines file that is not blank.

    Args:
        torn: skip a last line without a line break: a crash has cut it short.

    Raises:
        error: as :func:`read_lines` and :func:`parse_json`.
    """
    for number, line in read_lines(path, error):
        if not line.strip() or (torn and not line.endswith("\n")):
            continue
        where = f"{path}: line {number}"
        yield number, parse_json(line, where, error, remedy=remedy, allow_nan=allow_nan)


def json_sha256(*values: Any) -> str:
    """SHA-256 of the values' JSON array, in hexadecimal: a key or fingerprint of them."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def parse_json(
    text: str,
    where: str,
    error: type[V2LError] = V2LError,
    *,
    remedy: str = "correct the file",
    allow_nan: bool = False,
) -> Any:
    """Parse a JSON text, and refuse values that other code would fail on.

    Args:
        where: name of the text in errors, as "FILE" or "FILE: line 3".
        allow_nan: whether NaN and infinite numbers are accepted.

    Raises:
        error: the text is not JSON, is nested more than `MAX_DEPTH` levels deep, or holds an
            integer of more than 64 bits, a number that is not finite, a key twice in one object,
            or half of a surrogate pair, which cannot be written to a file or terminal.
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
        position = f"line {cause.lineno}, column {cause.colno}"
        if text.find("\n") in (-1, len(text) - 1):
            # For JSON lines, `where` already names the line.
            position = f"column {cause.colno}"
        near = excerpt(text[cause.pos : cause.pos + 40])
        line = f"{where}: not JSON ({cause.msg} at {position}, near {near}); {remedy}"
        raise error(line) from None
    except _RefusedValue as cause:
        raise error(f"{where}: {cause}; {remedy}") from None
    return value


class _RefusedValue(ValueError):
    """A JSON value that parses but is not accepted; the message says why."""


def _refuse_special(path: str | os.PathLike, mode: int, error: type[V2LError]) -> None:
    if stat.S_ISREG(mode):
        return
    kind = next((name for test, name in _KINDS if test(mode)), "not a regular file")
    raise error(f"{path}: {kind}, not a regular file; name a file")


@contextmanager
def _read_errors(path: str | os.PathLike, error: type[V2LError]) -> Iterator[None]:
    """Raise the operating system's errors as one that names the file."""
    try:
        yield
    except (V2LError, FileNotFoundError):
        raise
    except OSError as cause:
        remedy = "check the path and its permissions"
        if cause.errno in (errno.EMFILE, errno.ENFILE):
            remedy = "close files or raise the limit (ulimit -n)"
        raise error(f"{path}: cannot be read ({cause.strerror}); {remedy}") from None


def _integer(digits: str) -> int:
    # `int` takes quadratic time in the length, and has a limit of its own.
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
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _RefusedValue(f"the key {excerpt(key)} appears twice in one object")
    return value


_STRICT = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_number, parse_constant=_constant
)
_LENIENT = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)


def _refuse_depth(value: Any) -> None:
    """Raise RecursionError for more than `MAX_DEPTH` levels."""
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


# --- writing --------------------------------------------------------------------------------------


@contextmanager
def replacing(path: str | os.PathLike, suffix: str = ".part") -> Iterator[Path]:
    """Yield the path of a temporary file that replaces ``path`` when the block ends.

    The file is on the disk before it replaces the old one, and is removed if the block raises.
    Through a symbolic link, the file it points to is replaced. The content is copied into a device
    or pipe, which stays.

    Args:
        suffix: suffix of the temporary file, for writers that depend on it.

    Raises:
        WriteError: the path is a folder, a disk or a socket, or cannot be written.
    """
    path = Path(path)
    target = write_target(path)
    # The name itself may already be as long as the file system allows.
    name = f".{path.name[:50]}.{uuid.uuid4().hex}{suffix}"
    with write_errors(path):
        if target is None:
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder) / name
                _copy_into(Path(folder) / name, path)
            return
        part = target.with_name(name)
        try:
            yield part
            with open(part, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 text file, such that ``path`` is either the old file or the whole new one.

    Raises:
        WriteError: the folder does not exist or is not writable, or the disk is full.
    """
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def write_json(
    path: str | os.PathLike, value: Any, *, allow_nan: bool = True, private: bool = False
) -> None:
    """Write a JSON file, indented, as :func:`write_text` does; make its folder if needed.

    Args:
        allow_nan: write NaN and infinite numbers, which are not JSON.
        private: only the file's owner can read it.

    Raises:
        WriteError: as :func:`write_text`.
        ValueError: a number is not finite and `allow_nan` is False.
    """
    _write_bytes(path, _json_bytes(value, indent=2, allow_nan=allow_nan), private)


def write_jsonl(path: str | os.PathLike, rows: Iterable[Any], *, private: bool = False) -> None:
    """Write a JSON-lines file as :func:`write_json` does.

    Raises:
        WriteError: as :func:`write_text`.
    """
    _write_bytes(path, b"".join(map(_json_bytes, rows)), private)


def append_jsonl(path: str | os.PathLike, rows: Iterable[Any], *, fsync: bool = False) -> None:
    """Append lines to a JSON-lines file in one write; make the file if needed, not its folder.

    Other processes may append to the same file. A last line that a crash has cut short stays a
    line of its own. A symbolic link is not followed.

    Args:
        fsync: whether the lines are on the disk when this returns.

    Raises:
        V2LError: the file cannot be written, or is not a regular file. An OSError is its
            ``__context__``.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | _NONBLOCK | _NOFOLLOW
    try:
        descriptor = os.open(path, flags, 0o666)
        try:
            status = os.fstat(descriptor)
            _refuse_special(path, status.st_mode, V2LError)
            data = b"".join(map(_json_bytes, rows))
            if status.st_size and os.pread(descriptor, 1, status.st_size - 1) != b"\n":
                data = b"\n" + data
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            if fsync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as cause:
        raise V2LError(
            f"{path}: cannot be written ({cause.strerror}); "
            "check its folder, its permissions and the free space"
        ) from None


def drop_torn_line(path: str | os.PathLike) -> None:
    """Cut a text file back to its last line break, if a crash has cut its last line short.

    Raises:
        WriteError: the file cannot be changed.
    """
    with write_errors(Path(path)), open(path, "rb+") as handle:
        size = os.fstat(handle.fileno()).st_size
        if size:
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
                whole = content.rfind(b"\n") + 1
            if whole < size:
                handle.truncate(whole)


def _json_bytes(value: Any, **options: Any) -> bytes:
    # The escape of a lone surrogate is the same in JSON and in Python.
    text = json.dumps(value, ensure_ascii=False, **options) + "\n"
    return text.encode("utf-8", "backslashreplace")


def _write_bytes(path: str | os.PathLike, data: bytes, private: bool) -> None:
    path = Path(path)
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    mode = 0o600 if private else 0o666
    with (
        replacing(path) as part,
        open(part, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file,
    ):
        file.write(data)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Raise the operating system's errors as a WriteError that names the file."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        reason = os_error_reason(error)
        raise WriteError(f"{path}: cannot be written: {reason}", error) from None


def write_target(path: Path) -> Path | None:
    """The file that a write to ``path`` replaces or creates; None if ``path`` is a device or pipe.

    Raises:
        WriteError: the path is a folder, a disk or a socket.
    """
    with write_errors(path):
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            # A link may point to a file that does not exist yet.
            return Path(os.path.realpath(path)) if path.is_symlink() else path
    if stat.S_ISDIR(mode):
        raise WriteError(f"{path}: is a folder; name a file in it")
    if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):
        return None
    if not stat.S_ISREG(mode):
        raise WriteError(f"{path}: is neither a file, a pipe nor a character device; name a file")
    link = path
    while link.is_symlink():
        if os.path.realpath(link.parent).startswith("/proc/"):
            # An open file of this process, such as /dev/stdout, which others write to, too.
            return None
        link = link.parent / os.readlink(link)
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _copy_into(source: Path, path: Path) -> None:
    """Copy a file's bytes into a device or pipe."""
    try:
        # Without O_NONBLOCK, opening a pipe without a reader would wait forever.
        handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENXIO:
            line = f"{path}: nothing reads from this pipe; start its reader first"
            raise WriteError(line) from None
        raise
    os.set_blocking(handle, True)
    with open(handle, "wb") as sink, open(source, "rb") as content:
        shutil.copyfileobj(content, sink)
