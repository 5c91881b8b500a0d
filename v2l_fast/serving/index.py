"""What a store knows of its adapters without opening them: a cache of their files' headers.

The files are the truth. The index file spares reading every header at each start; whatever is
missing, broken or behind in it is read from the files again.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from v2l_fast.adapter import FORMAT
from v2l_fast.serving.staging import exclusive

log = logging.getLogger(__name__)

SUFFIX = ".safetensors"
ID = re.compile(r"[0-9a-f]{32}")
# A folder's modification time is only as fine as the kernel's clock tick or the file server's.
_SETTLED_NS = 2_000_000_000
# What reading the header of a file that is no adapter may raise.
NO_HEADER = (
    SafetensorError, StopIteration, AttributeError, LookupError, TypeError, ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class StoredAdapter:
    """What the index knows of an adapter.

    Attributes:
        id: 32 hexadecimal digits, a hash of the adapter's content.
        bytes: size of its file.
        created: Unix time in seconds at which the file was written.
        rank: generated rank, all chunks together.
        name: file name of the video, None when unknown or composed.
        video: sha256 of the video's bytes, None when unknown or composed.
        frames: frames it was made from.
        duration: seconds of the video.
        hypernetwork: fingerprint of the one that made it, None when unknown.
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


class Index:
    """The records of the adapters in a folder. One thread at a time.

    Args:
        file: the index file, one JSON line an adapter.
        adapters: the folder; its files are ``<id>.safetensors``, others are left alone.
        lock: lock file of the store, held to replace the index file.
        damaged: told the id, inode and reason of a file that has no adapter's header.
    """

    def __init__(
        self, file: Path, adapters: Path, lock: Path, damaged: Callable[[str, int, str], None]
    ) -> None:
        self._file = file
        self._adapters = adapters
        self._lock = lock
        self._damaged = damaged
        self._scanned_ns: int | None = None
        self._known = self._read()

    def records(self) -> dict[str, StoredAdapter]:
        """Id -> record, up to date with the folder; cheap when nothing changed.

        Raises:
            OSError: the folder cannot be read.
        """
        changed_ns = self._adapters.stat().st_mtime_ns
        if changed_ns == self._scanned_ns:
            return self._known
        now_ns = time.time_ns()
        found: dict[str, os.stat_result] = {}
        for entry in os.scandir(self._adapters):
            adapter_id = entry.name.removesuffix(SUFFIX)
            if entry.name.endswith(SUFFIX) and ID.fullmatch(adapter_id):
                # Another process may delete it between the two calls.
                with suppress(FileNotFoundError):
                    found[adapter_id] = entry.stat()
        for adapter_id in self._known.keys() - found.keys():
            del self._known[adapter_id]
        for adapter_id, stat in found.items():
            known = self._known.get(adapter_id)
            if known is None or (known.bytes, known.created) != (stat.st_size, stat.st_mtime):
                self.learn(adapter_id)
        self._scanned_ns = changed_ns if now_ns - changed_ns > _SETTLED_NS else None
        return self._known

    def learn(self, adapter_id: str) -> None:
        """Take in a file's header; report a file that has none."""
        path = self._adapters / f"{adapter_id}{SUFFIX}"
        self._known.pop(adapter_id, None)
        try:
            stat = path.stat()
            record = _record(adapter_id, path, stat)
        except OSError as error:
            # Deleted by another process, or not readable now: not known, which is the truth.
            log.warning("%s: not indexed: %s", path, error)
            return
        except NO_HEADER as error:
            self._damaged(adapter_id, stat.st_ino, f"not a whole adapter file ({error})")
            return
        self._known[adapter_id] = record
        # The last line may have been cut short by a crash. One that is lost costs a header read.
        with suppress(OSError), open(self._file, "a") as index:
            index.write("\n" + json.dumps(asdict(record)))

    def forget(self, adapter_id: str) -> None:
        """An adapter is gone."""
        self._known.pop(adapter_id, None)

    def _read(self) -> dict[str, StoredAdapter]:
        """What the index file says, unchecked."""
        known = {}
        try:
            lines = self._file.read_text(errors="replace").splitlines()
        except OSError:
            return {}
        for line in lines:
            # A line cut short by a crash, or one of another version: its file is read again.
            with suppress(TypeError, ValueError):
                record = StoredAdapter(**json.loads(line))
                known[record.id] = record
        if len(lines) > 2 * len(known) + 64:
            # Mostly of adapters that are gone: written anew from the files.
            with suppress(OSError), exclusive(self._lock):
                self._file.unlink()
            return {}
        return known


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Provenance and generated rank of an adapter file.

    Raises:
        OSError: it cannot be read; or one of NO_HEADER: it is no adapter file.
    """
    with safe_open(path, framework="pt") as handle:
        provenance = json.loads(handle.metadata()[FORMAT])["provenance"]
        key = next(k for k in handle.offset_keys() if k.endswith(".lora_A"))
        return provenance, handle.get_slice(key).get_shape()[1]


def _record(adapter_id: str, path: Path, stat: os.stat_result) -> StoredAdapter:
    provenance, rank = read_header(path)
    source = provenance.get("source", {})
    return StoredAdapter(
        adapter_id,
        stat.st_size,
        stat.st_mtime,
        rank,
        source.get("name"),
        source.get("sha256"),
        len(source["frame_indices"]) if "frame_indices" in source else None,
        source.get("duration"),
        provenance.get("hypernetwork"),
    )
