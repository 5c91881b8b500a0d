"""Checks of outputs before the work begins, and the folders and journals that long runs resume.

An output never replaces an input or a device, and an existing file only with ``--force``. Errors
name the file, the problem and the remedy.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from v2l_fast.errors import ConfigError, V2LError, WriteError, excerpt
from v2l_fast.files import (
    LARGE_BYTES,
    append_jsonl,
    drop_torn_line,
    read_json,
    read_jsonl,
    write_errors,
    write_json,
    write_target,
)


def check_output(
    path: str | os.PathLike, inputs: Iterable[str | os.PathLike] = (), force: bool = False
) -> None:
    """Check that an output file may be written.

    An empty file counts as absent. A device or pipe is written to, never replaced.

    Args:
        inputs: files that the work reads; the output must not be one of them under another name.
        force: accept an existing file.

    Raises:
        WriteError: the output is an input or a folder, exists already, or cannot be written.
    """
    path = Path(path)
    for source in inputs:
        if _same_file(path, source):
            raise WriteError(f"{path}: is the input {source}; name another output")
    target = write_target(path)
    if target is None:
        if not os.access(path, os.W_OK):
            raise WriteError(f"{path}: cannot be written; check its permissions")
        return
    with write_errors(path):
        size = target.stat().st_size if target.exists() else 0
    if size and not force:
        raise WriteError(f"{path}: exists already; name another output, or use --force")
    _check_writable(path, target.parent)


def check_folder(
    folder: str | os.PathLike,
    names: Iterable[str] = (),
    inputs: Iterable[str | os.PathLike] = (),
    force: bool = False,
) -> None:
    """Check that files may be written to a folder, which may exist.

    Args:
        names: files that will be written, each as in :func:`check_output`.

    Raises:
        WriteError: the folder is a file or cannot be written, or one of the files is refused.
    """
    folder, inputs = Path(folder), list(inputs)
    with write_errors(folder):
        if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
            raise WriteError(f"{folder}: is not a folder; name another one")
    _check_writable(folder, folder)
    for name in names:
        check_output(folder / name, inputs, force)


def check_new_folder(
    folder: str | os.PathLike, inputs: Iterable[str | os.PathLike] = (), force: bool = False
) -> None:
    """Check that a folder may be written as a whole.

    Args:
        inputs: files and folders that the work reads; the output must not be or contain one.
        force: accept a folder that an earlier run of the same command wrote.

    Raises:
        WriteError: the folder is or contains an input, is not empty, or cannot be written.
    """
    folder = Path(folder)
    check_folder(folder)
    real = Path(os.path.realpath(folder))
    for source in inputs:
        path = Path(os.path.realpath(source))
        # The name of a hub repository or preset is not a path, and nothing is overwritten.
        if path.exists() and (path.is_relative_to(real) or _same_file(folder, source)):
            raise WriteError(f"{folder}: contains the input {source}; name another folder")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise WriteError(f"{folder}: is not empty; name another folder, or use --force")


def _same_file(path: str | os.PathLike, other: str | os.PathLike) -> bool:
    try:
        # Writing to a device does not change it.
        regular = stat.S_ISREG(os.stat(path).st_mode) or stat.S_ISDIR(os.stat(path).st_mode)
        return regular and os.path.samefile(path, other)
    except (OSError, ValueError):
        return False


def _check_writable(path: Path, folder: Path) -> None:
    """Create a temporary file in the folder, or in its first existing parent.

    Permissions alone do not tell whether a file system is writable.
    """
    with write_errors(path):
        while not folder.exists():
            # A dangling link: the folder would be created where it points.
            folder = Path(os.path.realpath(folder)).parent
        with tempfile.TemporaryFile(dir=folder):
            pass


# --- folders written whole ------------------------------------------------------------------------


@contextmanager
def replacing_folder(path: str | os.PathLike, error: type[V2LError]) -> Iterator[Path]:
    """A temporary folder that replaces ``path`` when the block succeeds.

    An earlier folder is replaced only if the block writes all the files that are in it: others may
    be what the caller did not mean to lose.

    Raises:
        error: ``path`` is a file, cannot be written, or holds files that the block does not write.
    """
    # Behind a symbolic link the folder is replaced, not the link.
    path = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    part = old = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_dir():
            raise error(f"{path}: is a file; name a directory")
        unique = f".{path.name[:50]}.{uuid.uuid4().hex}"
        part = path.with_name(f"{unique}.part")
        part.mkdir()
        yield part
        if path.exists():
            foreign = sorted({f.name for f in path.iterdir()} - {f.name for f in part.iterdir()})
            if foreign:
                raise error(f"{path}: holds other files ({foreign[0]}); name an empty directory")
            old = path.with_name(f"{unique}.old")
            os.replace(path, old)
        os.replace(part, path)
    except OSError as cause:
        raise error(f"{path}: cannot be written ({cause.strerror or cause})") from None
    finally:
        if old is not None and old.exists() and not path.exists():
            os.replace(old, path)
        for leftover in (part, old):
            if leftover is not None:
                shutil.rmtree(leftover, ignore_errors=True)


# --- folders of long runs -------------------------------------------------------------------------


class ResumableFolder:
    """A folder of results that a later run continues if its fingerprint is the same.

    The fingerprint is stored in ``run.json``.

    Args:
        path: the folder, created if needed.
        fingerprint: JSON values of everything that the results depend on.
        error: class of the errors raised.
        shared: accept a folder with other files in it.

    Raises:
        error: the folder belongs to a run with another fingerprint, or contains other files.
        WriteError: the folder cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        fingerprint: Mapping[str, Any],
        error: type[V2LError] = ConfigError,
        *,
        shared: bool = False,
    ) -> None:
        self.path = Path(path)
        self._error = error
        record = self.path / "run.json"
        if record.exists():
            remedy = f"delete {self.path} or name another folder"
            saved = read_json(record, error=error, kind=dict, remedy=remedy)
            remedy = "repeat that run's settings or name another folder"
            check_fingerprint(self.path, saved, fingerprint, error, remedy)
            return
        if not shared and self.path.is_dir() and any(self.path.iterdir()):
            raise error(f"{self.path}: is not empty and holds no earlier run; name another folder")
        write_json(record, fingerprint)

    def record(self, name: str, compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The JSON record ``name``, computed unless an earlier run has written it.

        Raises:
            error: the file is not a JSON object.
        """
        path = self.path / f"{name}.json"
        if not path.exists():
            write_json(path, compute())
        return self.read(name)

    def read(self, name: str) -> dict[str, Any]:
        """The JSON record ``name``, which exists.

        Raises:
            error: the file is not a JSON object.
        """
        return read_json(
            self.path / f"{name}.json", LARGE_BYTES, self._error, kind=dict,
            remedy="delete it to make it again", allow_nan=True,
        )  # fmt: skip


def check_fingerprint(
    where: str | os.PathLike,
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    error: type[V2LError],
    remedy: str,
) -> None:
    """Compare the fingerprint of an earlier run with the current one.

    Raises:
        error: they differ; names the first difference and the number of others.
    """
    old = dict(_flatten(saved))
    new = dict(_flatten(json.loads(json.dumps(current))))
    if changed := [key for key in sorted(old | new) if old.get(key) != new.get(key)]:
        key = changed[0]
        more = f" (and {len(changed) - 1} more settings differ)" if len(changed) > 1 else ""
        before, now = (json.dumps(values.get(key)) for values in (old, new))
        raise error(
            f"{where}: made with {key}={excerpt(before)[1:-1]}, now it is {excerpt(now)[1:-1]}"
            f"{more}; {remedy}"
        )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# --- journals -------------------------------------------------------------------------------------


class Journal:
    """An append-only mapping in memory and, with a path, in a JSON-lines file. Thread-safe.

    A batch is on disk when ``append`` returns, and a line that a crash cut short is dropped when
    the file is opened again. The caller defines what the values are.

    Args:
        path: the file, created with its folder by the first ``append``; None keeps the entries in
            memory only.

    Raises:
        ConfigError: a line other than the last is not a journal entry.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._entries: dict[str, Any] = {}
        self._lock = Lock()
        if path is not None and path.exists():
            self._read(path)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __getitem__(self, key: str) -> Any:
        return self._entries[key]

    def __len__(self) -> int:
        return len(self._entries)

    def append(self, entries: Mapping[str, Any]) -> None:
        """Add entries (JSON values); an existing key is overwritten."""
        with self._lock:
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                rows = ({"key": key, "value": value} for key, value in entries.items())
                append_jsonl(self.path, rows, fsync=True)
            self._entries.update(entries)

    def _read(self, path: Path) -> None:
        remedy = "delete the line to make it again"
        lines = read_jsonl(path, ConfigError, remedy=remedy, allow_nan=True, torn=True)
        for number, entry in lines:
            if not isinstance(entry, dict) or not isinstance(entry.get("key"), str):
                raise ConfigError(
                    f"{path}: line {number} is not an entry of an evaluation; {remedy}"
                )
            self._entries[entry["key"]] = entry.get("value")
        drop_torn_line(path)
