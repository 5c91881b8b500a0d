"""An append-only mapping on disk, from which an interrupted evaluation resumes.

Responsible for durability: a batch is on disk when ``append`` returns, and a line that a crash cut
short is dropped when the file is opened again. The caller defines what the values are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from v2l_fast.errors import ConfigError
from v2l_fast.files import append_jsonl, drop_torn_line, read_jsonl


class Journal:
    """A growing mapping in memory and, with a path, in a JSON-lines file. Thread-safe.

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
