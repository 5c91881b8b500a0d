"""Files under construction: a folder of this process's own, removed by whoever finds it orphaned.

A file is written here and moved to where it counts in one step. Each process owns a folder beside
a lock file that it holds for as long as it lives; the kernel lets go of the lock when the process
ends, however it ends, which tells others that the folder may go.
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
    """This process's part of the staging folder ``root``; what dead processes left is removed.

    Raises:
        OSError: the folder cannot be made or written.
    """

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        name, lock = _claim(root)
        self.folder = root / name
        self.folder.mkdir()
        self._finalizer = weakref.finalize(self, _release, lock, self.folder)

    def new_path(self, suffix: str = "") -> Path:
        """A path that nobody else uses."""
        return self.folder / f"{uuid.uuid4().hex}{suffix}"

    def remove(self, path: Path) -> None:
        """Remove a file or folder of this process, if it is still there."""
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the folder and all that is in it."""
        self._finalizer()


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``, alone among all processes and threads; waits for it."""
    handle = _open_lock(path, os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _open_lock(path: Path, flags: int = 0) -> int:
    """A descriptor of a lock file; a named pipe or a link in its place is not waited for."""
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | flags, 0o666)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _claim(root: Path) -> tuple[str, int]:
    """A new name under ``root`` and the descriptor that holds its lock."""
    while True:
        name = uuid.uuid4().hex
        path = root / f"{name}{_LOCK_SUFFIX}"
        lock = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Another process may have taken the file for an orphan before it was locked.
        if _is_same(lock, path):
            return name, lock
        os.close(lock)


def _release(lock: int, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_name(folder.name + _LOCK_SUFFIX).unlink(missing_ok=True)
    os.close(lock)


def _sweep(root: Path) -> None:
    """Remove the folders whose owners no longer live."""
    for path in root.glob(f"*{_LOCK_SUFFIX}"):
        # Locked by the living, or not ours to open.
        with suppress(OSError):
            handle = _open_lock(path)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                folder = path.with_suffix("")
                if folder.exists():
                    log.info("%s: removed, the process that wrote there is gone", folder)
                    shutil.rmtree(folder, ignore_errors=True)
                if _is_same(handle, path):
                    path.unlink()
            finally:
                os.close(handle)
    # A folder is made after its lock file and goes before it; one without was copied here.
    for folder in [path for path in root.iterdir() if path.is_dir()]:
        if not folder.with_name(folder.name + _LOCK_SUFFIX).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _is_same(handle: int, path: Path) -> bool:
    try:
        return os.fstat(handle).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False
