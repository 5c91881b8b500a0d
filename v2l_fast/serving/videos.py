"""Video files the server keeps, by content: what is internalized, and put in context to compare.

Responsible for the files and the space they take; receiving and decoding them is done elsewhere.
The name a person gave a file is kept beside it, never in a path, which may be logged.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from v2l_fast.errors import V2LError, VideoError
from v2l_fast.files import file_sha256, read_text
from v2l_fast.store.adapter_store import StoreError
from v2l_fast.store.staging import Staging, sync_folder

FILE_NAME = "video"
NAME_NAME = "name"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_NAME = 200
# Attempts, 10 ms apart, to put a video where another process uses one whose file is gone.
_ATTEMPTS = 100


@dataclass(frozen=True)
class KeptVideo:
    """A video's content hash (sha256 of its bytes) and the file that has it."""

    sha256: str
    path: Path


@dataclass(frozen=True)
class ReceivedVideo:
    """A video that is not kept yet: an upload in the staging folder, or a file on the server.

    Attributes:
        sha256: of its bytes.
        path: where they are now.
        name: what its owner calls it, as it was sent.
        linked: a file on the server, which stays where it is.
    """

    sha256: str
    path: Path
    name: str
    linked: bool = False


class VideoFolder:
    """Videos under ``folder``, ``<sha256>/video``: a file, or a link to one on the server.

    Processes may share the folder. Whoever uses a video holds a shared lock on its folder, which
    the kernel releases when the process ends; only who gets it exclusively removes it.

    Args:
        staging: where files under construction lie, on the same file system.
        limit: bytes of all files together; beyond it the least recently used go. Links are free.

    Raises:
        StoreError: the folder cannot be made.
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
        # Videos a job or a question is reading: how many of them, and the lock they share.
        self._in_use: dict[str, int] = {}
        self._locks: dict[str, int] = {}

    @staticmethod
    def uploaded(part: Path, name: str) -> ReceivedVideo:
        """A complete upload in the staging folder.

        Raises:
            VideoError: it is empty.
        """
        if part.stat().st_size == 0:
            raise VideoError(f"{part}: an empty file (0 bytes)")
        return ReceivedVideo(file_hash(part), part, name)

    @staticmethod
    def linked(path: Path) -> ReceivedVideo:
        """A file that stays where it is."""
        return ReceivedVideo(file_hash(path), path, path.name, linked=True)

    def keep(self, video: ReceivedVideo) -> KeptVideo:
        """Move an upload here, or link to a file on the server; in use until :meth:`release`.

        A video that is kept already takes the new name.

        Raises:
            StoreError: the disk is full.
        """
        sha256, target = video.sha256, self.folder / video.sha256
        new = self._staging.new_path()
        used = False
        try:
            new.mkdir()
            (new / NAME_NAME).write_text(clean_name(video.name))
            used = self._use(sha256)
            if used:
                os.replace(new / NAME_NAME, target / NAME_NAME)
            else:
                self._move(video, new / FILE_NAME)
                sync_folder(new)
                self._place(new, target)
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
        return KeptVideo(sha256, target / FILE_NAME)

    def _place(self, new: Path, target: Path) -> None:
        """Make a new folder the video's, in use; or use what another process has put there."""
        for _ in range(_ATTEMPTS):
            with self._mutex:
                # Locked before it can be seen, or another process might remove it at once.
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
            # A link that leads nowhere, or what a crash has left.
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
        """The video with this content, in use until :meth:`release`; None when it is not kept."""
        if sha256 is None or not self._use(sha256):
            return None
        with suppress(OSError):
            os.utime(self.folder / sha256)
        return KeptVideo(sha256, self.folder / sha256 / FILE_NAME)

    def _use(self, sha256: str) -> bool:
        """Count one more use, if the video is kept."""
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
        """Count one more use, with its lock when it is the first; call with the mutex held."""
        if lock is not None:
            if sha256 in self._locks:
                os.close(self._locks[sha256])
            self._locks[sha256] = lock
        self._in_use[sha256] = self._in_use.get(sha256, 0) + 1

    def release(self, sha256: str) -> None:
        """The end of a use."""
        with self._mutex:
            self._in_use[sha256] -= 1
            if not self._in_use[sha256]:
                del self._in_use[sha256]
                os.close(self._locks.pop(sha256))

    def has(self, sha256: str | None) -> bool:
        """Whether a video with this content is kept."""
        known = sha256 is not None and _SHA256.fullmatch(sha256) is not None
        return known and (self.folder / sha256 / FILE_NAME).is_file()

    def name(self, sha256: str | None) -> str | None:
        """The name its file had."""
        if sha256 is None or not _SHA256.fullmatch(sha256):
            return None
        with suppress(V2LError):
            return read_text(self.folder / sha256 / NAME_NAME)
        return None

    def kept(self) -> set[str]:
        """The content hashes of all videos here."""
        return {name for name in os.listdir(self.folder) if _SHA256.fullmatch(name)}

    def delete(self, sha256: str, needed: Callable[[], bool] = lambda: False) -> None:
        """Remove a video, unless it is in use, here or in another process.

        Args:
            needed: asked when nobody can begin to use it any more; it stays if true.
        """
        if _SHA256.fullmatch(sha256):
            self._remove(sha256, needed)

    def _remove(self, sha256: str, needed: Callable[[], bool]) -> None:
        path, old = self.folder / sha256, self._staging.new_path()
        with self._mutex:
            if sha256 in self._in_use:
                return
            lock = _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock is None:
                return
            try:
                if not needed():
                    # In one step: nobody sees a part of it.
                    with suppress(OSError):
                        os.rename(path, old)
            finally:
                os.close(lock)
        self._staging.remove(old)

    def _shrink(self) -> None:
        """Remove the least recently used files until the rest fits the limit."""
        sizes = []
        for entry in os.scandir(self.folder):
            with suppress(OSError):
                size = os.lstat(Path(entry.path) / FILE_NAME).st_size
                sizes.append((entry.stat().st_mtime, entry.name, size))
        total = sum(size for _, _, size in sizes)
        for _, name, size in sorted(sizes):
            if total <= self._limit:
                return
            self.delete(name)
            if not self.has(name):
                total -= size


def _locked(folder: Path, how: int) -> int | None:
    """A descriptor that holds a folder's lock; None when it is held by others, or the folder is not
    there any more."""
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


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, as in an adapter's provenance.

    Raises:
        VideoError: it cannot be read.
    """
    try:
        return file_sha256(path)
    except OSError as error:
        raise VideoError(f"{path}: cannot be read ({error.strerror})") from None


def clean_name(name: str) -> str:
    """A file name for display: its last part, printable, of bounded length."""
    last = re.split(r"[/\\]", name)[-1]
    printable = "".join(c for c in last if c.isprintable())
    return printable.encode("utf-8", "ignore").decode()[:_MAX_NAME] or "video"


def allowed_path(path: str, root: Path | None) -> Path:
    """A server-side file under ``root``, links resolved.

    Raises:
        VideoError: it is elsewhere or not a file; the answer is the same for both, so that nobody
            can ask which files exist outside.
    """
    if root is None:
        raise VideoError("this server takes no paths; upload the video as multipart/form-data")
    refused = VideoError("there is no such file under the folder this server may read")
    try:
        resolved = (root / path).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        raise refused from None
    if not resolved.is_relative_to(root.resolve()) or not resolved.is_file():
        raise refused
    return resolved
