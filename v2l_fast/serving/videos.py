"""Video files that the server keeps, by content: to internalize them, and to put them in context.

Responsible for the files and the space they take; receiving and decoding happen elsewhere. The name
a caller gave a file is stored next to it, never in a path, because paths are logged.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from v2l_fast.errors import V2LError, VideoError
from v2l_fast.files import file_sha256, read_text
from v2l_fast.store.adapter_store import StoreError
from v2l_fast.store.folder import Staging, sync_folder

# Writing happens in a thread; a switch for each network packet would cost more than the copy.
WRITE_BYTES = 1 << 20
VIDEO_FILE = "video"
NAME_FILE = "name"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_NAME = 200
# Attempts, 10 ms apart, to replace a video that another process uses but whose file is gone.
_ATTEMPTS = 100


@dataclass(frozen=True)
class KeptVideo:
    """A video that is kept.

    Attributes:
        sha256: hash of its bytes when it was kept.
        path: its file, or a link to a file elsewhere.
    """

    sha256: str
    path: Path

    @property
    def trusted_sha256(self) -> str | None:
        """``sha256``, but None for a link: the file it names may have changed."""
        return None if self.path.is_symlink() else self.sha256


@dataclass(frozen=True)
class ReceivedVideo:
    """A video that is not kept yet.

    Attributes:
        sha256: hash of its bytes.
        path: a file in the staging folder, or elsewhere on the server.
        name: the file name that the caller sent.
        linked: the file stays where it is, and a link to it is kept.
    """

    sha256: str
    path: Path
    name: str
    linked: bool = False

    @classmethod
    def linked_to(cls, path: Path) -> ReceivedVideo:
        """A file on the server that stays where it is.

        Raises:
            VideoError: it cannot be read.
        """
        try:
            return cls(file_sha256(path), path, path.name, linked=True)
        except OSError as error:
            raise VideoError(f"{path}: cannot be read ({error.strerror})") from None


class HashedFile(io.BufferedWriter):
    """A new file whose bytes are hashed as they are written."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "x"))
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        return super().write(data)

    @property
    def sha256(self) -> str:
        """Hash of all bytes so far, hexadecimal."""
        return self._digest.hexdigest()


class VideoFolder:
    """Videos under ``folder``, ``<sha256>/video``: a file, or a link to one on the server.

    Processes may share the folder. A process that uses a video holds a shared lock on its folder,
    which the kernel releases when the process ends; removing it takes the exclusive lock.

    Args:
        staging: for files under construction, on the same file system.
        limit: bytes of all files together; beyond it the least recently used are removed. Links
            do not count.

    Raises:
        StoreError: the folder cannot be created.
    """

    def __init__(self, folder: Path, staging: Staging, limit: int) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"{folder}: cannot be used ({error.strerror}); check its free space and permissions"
            ) from None
        self.folder = folder
        self._staging = staging
        self._limit = limit
        self._mutex = threading.Lock()
        # Of each video in use: the number of uses, and the lock they share.
        self._in_use: dict[str, int] = {}
        self._locks: dict[str, int] = {}

    def keep(self, video: ReceivedVideo) -> KeptVideo:
        """Move an upload here, or link to a file on the server; in use until :meth:`release`.

        A video that is already kept takes the new name.

        Raises:
            StoreError: the disk is full.
        """
        sha256, target = video.sha256, self.folder / video.sha256
        new = self._staging.new_path()
        used = False
        try:
            new.mkdir()
            (new / NAME_FILE).write_text(clean_name(video.name))
            used = self._use(sha256)
            if used:
                os.replace(new / NAME_FILE, target / NAME_FILE)
            else:
                self._move(video, new / VIDEO_FILE)
                sync_folder(new)
                self._publish(new, target)
                used = True
            os.utime(target)
        except OSError as error:
            if used:
                self.release(sha256)
            raise StoreError(
                f"{self.folder}: the video was not kept ({error.strerror}); free some space"
            ) from None
        finally:
            self._staging.remove(new)
        self._shrink()
        return KeptVideo(sha256, target / VIDEO_FILE)

    def _publish(self, new: Path, target: Path) -> None:
        """Rename a new folder to the video's and use it, or use another process's folder."""
        for _ in range(_ATTEMPTS):
            with self._mutex:
                # Locked before it is visible, or another process might remove it at once.
                lock = _locked(new, fcntl.LOCK_SH)
                try:
                    os.rename(new, target)
                except OSError as error:
                    os.close(lock)
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                        raise
                else:
                    self._hold(target.name, lock)
                    sync_folder(self.folder)
                    return
            if self._use(target.name):
                return
            # A dead link, or the remains of a crash.
            self._remove(target.name, lambda: self.has(target.name))
            if not target.is_dir():
                target.unlink(missing_ok=True)
            time.sleep(0.01)
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    @staticmethod
    def _move(video: ReceivedVideo, target: Path) -> None:
        if video.linked:
            target.symlink_to(video.path)
            return
        with open(video.path, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(video.path, target)

    def use(self, sha256: str | None) -> KeptVideo | None:
        """The video with this hash, in use until :meth:`release`; None if it is not kept."""
        if sha256 is None or not self._use(sha256):
            return None
        with suppress(OSError):
            os.utime(self.folder / sha256)
        return KeptVideo(sha256, self.folder / sha256 / VIDEO_FILE)

    def _use(self, sha256: str) -> bool:
        """Count one more use if the video is kept."""
        with self._mutex:
            if not self.has(sha256):
                return False
            lock = None
            if sha256 not in self._in_use:
                lock = _locked(self.folder / sha256, fcntl.LOCK_SH)
                if lock is None:
                    return False
            self._hold(sha256, lock)
            return True

    def _hold(self, sha256: str, lock: int | None) -> None:
        """Count one more use, with its lock if it is the first; call with the mutex held."""
        if lock is not None:
            if sha256 in self._locks:
                os.close(self._locks[sha256])
            self._locks[sha256] = lock
        self._in_use[sha256] = self._in_use.get(sha256, 0) + 1

    def release(self, sha256: str) -> None:
        """End a use."""
        with self._mutex:
            self._in_use[sha256] -= 1
            if not self._in_use[sha256]:
                del self._in_use[sha256]
                os.close(self._locks.pop(sha256))

    def has(self, sha256: str | None) -> bool:
        """Whether a video with this hash is kept."""
        valid = sha256 is not None and _SHA256.fullmatch(sha256) is not None
        return valid and (self.folder / sha256 / VIDEO_FILE).is_file()

    def name(self, sha256: str | None) -> str | None:
        """The file name of its last upload."""
        if sha256 is None or not _SHA256.fullmatch(sha256):
            return None
        with suppress(V2LError):
            return read_text(self.folder / sha256 / NAME_FILE)
        return None

    def kept(self) -> set[str]:
        """The hashes of all kept videos."""
        return {name for name in os.listdir(self.folder) if _SHA256.fullmatch(name)}

    def delete(self, sha256: str, needed: Callable[[], bool] = lambda: False) -> None:
        """Remove a video unless it is in use, here or in another process.

        Args:
            needed: called when no new use can begin; the video stays if it returns true.
        """
        if _SHA256.fullmatch(sha256):
            self._remove(sha256, needed)

    def _remove(self, sha256: str, needed: Callable[[], bool]) -> None:
        path, old = self.folder / sha256, self._staging.new_path()
        with self._mutex:
            if sha256 in self._in_use:
                return
            # One removal at a time in all processes: a video's lock that cannot be taken then means
            # a use, which ends with a removal of its own, and never a removal that is about to
            # decide that the video stays.
            with _closing(_locked(self.folder, fcntl.LOCK_EX)):
                lock = _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if lock is None:
                    return
                with _closing(lock):
                    if not needed():
                        # Atomic: other processes see all of it or nothing.
                        with suppress(OSError):
                            os.rename(path, old)
        self._staging.remove(old)

    def _shrink(self) -> None:
        """Remove the least recently used videos until the rest fits the limit."""
        sizes = []
        for entry in os.scandir(self.folder):
            with suppress(OSError):
                size = os.lstat(Path(entry.path) / VIDEO_FILE).st_size
                sizes.append((entry.stat().st_mtime, entry.name, size))
        total = sum(size for _, _, size in sizes)
        for _, name, size in sorted(sizes):
            if total <= self._limit:
                return
            self.delete(name)
            if not self.has(name):
                total -= size


def _locked(folder: Path, how: int) -> int | None:
    """A descriptor that holds a folder's lock; None if others hold it or the folder is gone."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(lock, how)
        if os.path.samestat(os.fstat(lock), os.stat(folder)):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


@contextmanager
def _closing(lock: int | None) -> Iterator[None]:
    """Close a lock's descriptor, which releases the lock, at the end of the block."""
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def clean_name(name: str) -> str:
    """A file name for display: its last part, printable, of bounded length."""
    last = re.split(r"[/\\]", name)[-1]
    printable = "".join(c for c in last if c.isprintable())
    return printable.encode("utf-8", "ignore").decode()[:_MAX_NAME] or "video"


def allowed_path(path: str, root: Path | None) -> Path:
    """A file on the server under ``root``, links resolved.

    Raises:
        VideoError: it is elsewhere or not a file. The message is the same for both, so that callers
            cannot learn which files exist outside.
    """
    if root is None:
        raise VideoError("this server accepts no paths; upload the video as multipart/form-data")
    refused = VideoError("no such file under the folder this server may read")
    try:
        resolved = (root / path).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        raise refused from None
    if not resolved.is_relative_to(root.resolve()) or not resolved.is_file():
        raise refused
    return resolved
