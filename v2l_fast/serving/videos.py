"""Video files the server keeps, by content: what is internalized, and put in context to compare.

Responsible for the files and the space they take; receiving and decoding them is done elsewhere.
The name a person gave a file is kept beside it, never in a path, which may be logged.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from v2l_fast.errors import VideoError
from v2l_fast.serving.staging import Staging, sync_folder
from v2l_fast.serving.store import StoreError

FILE_NAME = "video"
NAME_NAME = "name"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_NAME = 200


@dataclass(frozen=True)
class KeptVideo:
    """A video's content hash (sha256 of its bytes) and the file that has it."""

    sha256: str
    path: Path


class VideoFolder:
    """Videos under ``folder``, ``<sha256>/video``: a file, or a link to one on the server.

    Args:
        staging: where files under construction lie, on the same file system.
        limit: bytes of all files together; beyond it the least recently used go. Links are free.
    """

    def __init__(self, folder: Path, staging: Staging, limit: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._staging = staging
        self._limit = limit
        self._mutex = threading.Lock()
        # Videos a job or a question is reading: they are not removed.
        self._in_use: dict[str, int] = {}

    def keep(self, part: Path, name: str) -> KeptVideo:
        """Take over a complete file from the staging folder; in use until :meth:`release`.

        Raises:
            VideoError: it is empty.
            StoreError: the disk is full.
        """
        if part.stat().st_size == 0:
            raise VideoError(f"{part}: an empty file (0 bytes)")
        with open(part, "rb") as handle:
            os.fsync(handle.fileno())
        return self._add(file_hash(part), name, lambda place: os.replace(part, place))

    def link(self, path: Path) -> KeptVideo:
        """Refer to a file where it lies; in use until :meth:`release`."""
        return self._add(file_hash(path), path.name, lambda place: place.symlink_to(path))

    def _add(self, sha256: str, name: str, place: Callable[[Path], object]) -> KeptVideo:
        target = self.folder / sha256
        made = self._staging.new_path()
        with self._mutex:
            self._in_use[sha256] = self._in_use.get(sha256, 0) + 1
        try:
            made.mkdir()
            place(made / FILE_NAME)
            (made / NAME_NAME).write_text(clean_name(name))
            sync_folder(made)
            # Replaces a folder whose link leads nowhere; one that is sound stays.
            if not (target / FILE_NAME).is_file():
                shutil.rmtree(target, ignore_errors=True)
                with suppress(FileExistsError):
                    os.rename(made, target)
                sync_folder(self.folder)
            os.utime(target)
        except OSError as error:
            self.release(sha256)
            raise StoreError(
                f"{self.folder}: the video was not kept ({error.strerror}); free some space"
            ) from None
        finally:
            self._staging.remove(made)
        self._shrink()
        return KeptVideo(sha256, target / FILE_NAME)

    def use(self, sha256: str | None) -> KeptVideo | None:
        """The video with this content, in use until :meth:`release`; None when it is not kept."""
        with self._mutex:
            if not self.has(sha256):
                return None
            self._in_use[sha256] = self._in_use.get(sha256, 0) + 1
        with suppress(OSError):
            os.utime(self.folder / sha256)
        return KeptVideo(sha256, self.folder / sha256 / FILE_NAME)

    def release(self, sha256: str) -> None:
        """The end of a use."""
        with self._mutex:
            self._in_use[sha256] -= 1
            if not self._in_use[sha256]:
                del self._in_use[sha256]

    def has(self, sha256: str | None) -> bool:
        """Whether a video with this content is kept."""
        known = sha256 is not None and _SHA256.fullmatch(sha256) is not None
        return known and (self.folder / sha256 / FILE_NAME).is_file()

    def name(self, sha256: str | None) -> str | None:
        """The name its file had."""
        if sha256 is None or not _SHA256.fullmatch(sha256):
            return None
        with suppress(OSError, UnicodeDecodeError):
            return (self.folder / sha256 / NAME_NAME).read_text()
        return None

    def delete(self, sha256: str) -> None:
        """Forget a video, unless it is in use."""
        with self._mutex:
            if sha256 not in self._in_use and _SHA256.fullmatch(sha256):
                shutil.rmtree(self.folder / sha256, ignore_errors=True)

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
            if name not in self._in_use:
                self.delete(name)
                total -= size


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, as in an adapter's provenance.

    Raises:
        VideoError: it cannot be read.
    """
    try:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
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
