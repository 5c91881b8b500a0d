"""Files under construction, in a folder of each process that others remove once it is orphaned.

A file is written here and moved to its place atomically. Each process owns a folder beside a lock
file that it holds as long as it lives. The kernel releases the lock when the process ends, however
it ends; a folder whose lock is free is orphaned.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)

_LOCK_SUFFIX = ".lock"


class Staging:
    """This process's folder under ``root``; the folders of dead processes are removed.

    Raises:
        OSError: the folder cannot be created or written.
    """

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        name, lock = _claim(root)
        self.folder = root / name
        self.folder.mkdir()
        self._finalizer = weakref.finalize(self, _release, lock, self.folder)

    def new_path(self, suffix: str = "") -> Path:
        """A unique path in the folder."""
        return self.folder / f"{uuid.uuid4().hex}{suffix}"

    def remove(self, path: Path) -> None:
        """Remove a file or folder if it is still there."""
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the folder and its content."""
        self._finalizer()


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file ``path`` exclusively among all processes and threads; blocks."""
    handle = _open_lock(path, os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _open_lock(path: Path, flags: int = 0) -> int:
    """Open a lock file without blocking on a named pipe or following a link in its place."""
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | flags, 0o666)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _claim(root: Path) -> tuple[str, int]:
    """A new name under ``root``, and the descriptor that holds its lock."""
    while True:
        name = uuid.uuid4().hex
        path = root / f"{name}{_LOCK_SUFFIX}"
        lock = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Another process may have removed the file as an orphan before it was locked.
        if _is_same(lock, path):
            return name, lock
        os.close(lock)


def _release(lock: int, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_name(folder.name + _LOCK_SUFFIX).unlink(missing_ok=True)
    os.close(lock)


def _sweep(root: Path) -> None:
    """Remove the folders of dead processes."""
    for path in root.glob(f"*{_LOCK_SUFFIX}"):
        # Locked by a living process, or not permitted.
        with suppress(OSError):
            handle = _open_lock(path)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                folder = path.with_suffix("")
                if folder.exists():
                    log.info("%s: removed, its process has ended", folder)
                    shutil.rmtree(folder, ignore_errors=True)
                if _is_same(handle, path):
                    path.unlink()
            finally:
                os.close(handle)
    # A folder is created after its lock file and removed before it; one without was copied here.
    for folder in [path for path in root.iterdir() if path.is_dir()]:
        if not folder.with_name(folder.name + _LOCK_SUFFIX).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _is_same(handle: int, path: Path) -> bool:
    try:
        return os.fstat(handle).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False
