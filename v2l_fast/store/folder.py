"""A store's folder apart from its adapters: an index of their headers, and new files.

The adapters' files are authoritative. The index file avoids reading every header at each start;
entries that are missing, malformed or stale are read from the files again.

A file is written in the staging folder and moved to its place atomically. Each process owns a
staging folder, next to a lock file that it holds as long as it lives. The kernel releases the lock
when the process ends, however it ends; a folder whose lock is free is orphaned, and the next
process removes it.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import re
import shutil
import stat
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from v2l_fast.errors import AdapterError, V2LError, excerpt
from v2l_fast.files import append_jsonl, parse_json, read_lines
from v2l_fast.hypernet.adapter_files import read_record

log = logging.getLogger(__name__)

SUFFIX = ".safetensors"
ID = re.compile(r"[0-9a-f]{32}")
# Modification times are as coarse as the clock tick of the kernel or the file server.
_SETTLED_NS = 2_000_000_000
# A line of the index takes a few hundred bytes.
_LINE_BYTES, _INDEX_BYTES = 2**16, 2**30
_LOCK_SUFFIX = ".lock"


# --- the index ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredAdapter:
    """The index's record of an adapter.

    Attributes:
        id: 32 hexadecimal digits, a hash of the adapter's content.
        bytes: size of its file.
        created: Unix time in seconds at which the file was written.
        rank: generated rank, all chunks together.
        name: file name of the video; None if it is unknown or the adapter is composed.
        video: sha256 of the video's bytes; None if unknown or composed.
        frames: number of frames sampled.
        duration: of the video, in seconds.
        hypernetwork: fingerprint of the hypernetwork; None if unknown.
    """

    id: str
    bytes: int
    created: float
    rank: int
    name: str | None = None
    video: str | None = None
    frames: int | None = None
    duration: float | None = None
    hypernetwork: str | None = None

    def __post_init__(self) -> None:
        # The index file may contain anything; callers rely on these types.
        for name in ("bytes", "rank", "frames"):
            value = getattr(self, name)
            if not (type(value) is int and value >= 0 or value is None and name == "frames"):
                raise ValueError(f"{name} must be an integer of at least 0, got {excerpt(value)}")
        for name in ("created", "duration"):
            value = getattr(self, name)
            if value is None and name == "duration":
                continue
            if type(value) not in (int, float) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {excerpt(value)}")
        for name in ("name", "video", "hypernetwork"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name} must be text, got {excerpt(value)}")
        if not isinstance(self.id, str) or not ID.fullmatch(self.id):
            raise ValueError(f"id must be 32 hexadecimal digits, got {excerpt(self.id)}")


# Identifies a version of a file: device, inode, size, times.
Stamp = tuple[int, int, int, int, int]


def stamp(status: os.stat_result) -> Stamp:
    """The version of a file; writing to the file or replacing it changes it."""
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def settled(status: os.stat_result) -> bool:
    """Whether the file's times are old enough that the next change will change them."""
    return time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED_NS


class Index:
    """The records of the adapters in a folder; for one thread at a time.

    Args:
        file: the index file, one JSON line per adapter.
        adapters: the folder; files with names other than ``<id>.safetensors`` are ignored.
        lock: lock file of the store, held to delete the index file.
        on_damaged: called with the id, inode and reason for a file that is not an adapter.
        is_sound: called with the id of a file that changed since it was indexed; whether its
            content still matches its name.
    """

    def __init__(
        self,
        file: Path,
        adapters: Path,
        lock: Path,
        on_damaged: Callable[[str, int, str], None],
        is_sound: Callable[[str], bool],
    ) -> None:
        self._file = file
        self._adapters = adapters
        self._lock = lock
        self._on_damaged = on_damaged
        self._is_sound = is_sound
        self._running = False
        self._scanned_ns: int | None = None
        # Versions of files that are not adapters, which is logged once.
        self._skipped: dict[str, Stamp] = {}
        # Files that could not be read for a temporary reason, such as too many open files.
        self._unread: set[str] = set()
        self._records = self._read()

    def records(self) -> dict[str, StoredAdapter]:
        """Id -> record, up to date with the folder; cheap if nothing has changed.

        Raises:
            OSError: the folder cannot be read.
        """
        changed_ns = self._adapters.stat().st_mtime_ns
        if changed_ns == self._scanned_ns:
            return self._records
        now_ns = time.time_ns()
        files: dict[str, os.stat_result] = {}
        with os.scandir(self._adapters) as entries:
            for entry in entries:
                adapter_id = entry.name.removesuffix(SUFFIX)
                if entry.name.endswith(SUFFIX) and ID.fullmatch(adapter_id):
                    # Another process may delete it between the two calls.
                    with suppress(OSError):
                        files[adapter_id] = entry.stat(follow_symlinks=False)
        for adapter_id in self._records.keys() - files.keys():
            del self._records[adapter_id]
        for adapter_id in self._skipped.keys() - files.keys():
            del self._skipped[adapter_id]
        self._unread &= files.keys()
        for adapter_id, status in files.items():
            record = self._records.get(adapter_id)
            same = record and (record.bytes, record.created) == (status.st_size, status.st_mtime)
            if same and stat.S_ISREG(status.st_mode):
                continue
            # At the start the index may be older than a folder that was copied without its times.
            if record is None or not self._running or self._is_sound(adapter_id):
                self.update(adapter_id)
        self._running = True
        whole = now_ns - changed_ns > _SETTLED_NS and not self._unread
        self._scanned_ns = changed_ns if whole else None
        return self._records

    def update(self, adapter_id: str) -> None:
        """Read a file's header again; report a file that is not an adapter, once per version."""
        path = self._adapters / f"{adapter_id}{SUFFIX}"
        self._records.pop(adapter_id, None)
        try:
            status = os.lstat(path)
        except OSError:
            # Deleted by another process.
            return
        if self._skipped.get(adapter_id) == stamp(status):
            return
        try:
            record = _record(adapter_id, path, status)
        except AdapterError as error:
            cause = error.__context__
            if isinstance(cause, FileNotFoundError):
                return
            if isinstance(cause, OSError) and not isinstance(cause, PermissionError):
                if adapter_id not in self._unread:
                    self._unread.add(adapter_id)
                    log.warning("%s; skipped for now", error)
                return
            self._skipped[adapter_id] = stamp(status)
            if isinstance(cause, OSError) or not stat.S_ISREG(status.st_mode):
                log.error("%s; skipped", error)
            else:
                self._on_damaged(adapter_id, status.st_ino, str(error))
            return
        self._unread.discard(adapter_id)
        self._records[adapter_id] = record
        # A line that is lost costs one header read.
        with suppress(V2LError):
            append_jsonl(self._file, [asdict(record)])

    def forget(self, adapter_id: str) -> None:
        """Drop the record of an adapter."""
        self._records.pop(adapter_id, None)

    def _read(self) -> dict[str, StoredAdapter]:
        """The records of the index file, not compared with the files."""
        records: dict[str, StoredAdapter] = {}
        lines = 0
        try:
            if not self._file.is_symlink() and not self._file.exists():
                return {}
            if self._file.is_symlink():
                raise V2LError(f"{self._file}: a symbolic link, not a regular file")
            for number, line in read_lines(
                self._file, max_line_bytes=_LINE_BYTES, max_bytes=_INDEX_BYTES
            ):
                lines = number
                # A line cut short by a crash or of another version: its file is read again.
                with suppress(TypeError, ValueError, V2LError):
                    record = StoredAdapter(**parse_json(line, "index"))
                    records[record.id] = record
        except V2LError as error:
            log.warning("%s; the index is rebuilt", error)
        else:
            if lines <= 2 * len(records) + 64:
                return records
            # Most lines are of deleted adapters: rebuild the index.
        with suppress(OSError), exclusive(self._lock):
            self._file.unlink()
        return {}


def _record(adapter_id: str, path: Path, status: os.stat_result) -> StoredAdapter:
    record = read_record(path, follow=False)
    provenance = record.provenance
    source = provenance.get("source") or {}
    frames = source.get("frame_indices")
    return StoredAdapter(
        adapter_id,
        status.st_size,
        status.st_mtime,
        record.rank,
        source.get("name"),
        source.get("sha256"),
        None if frames is None else len(frames),
        source.get("duration"),
        provenance.get("hypernetwork"),
    )


# --- files under construction ---------------------------------------------------------------------


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
