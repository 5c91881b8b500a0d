"""Which files the chosen library left to PyAV, and why."""

from __future__ import annotations

import logging
import threading
from collections import Counter

log = logging.getLogger(__name__)


class Fallbacks:
    """Files that the chosen library left to PyAV: right frames, but slower. Thread-safe.

    Each file is logged and counted once, however often it is read. Each process counts its own:
    data workers do not add to their parent's count.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: set[str] = set()
        self._reasons: Counter[str] = Counter()

    def add(self, path: str, reason: str, detail: str = "") -> None:
        """Count `path` as read by PyAV. reason: one of a few; detail: specific to this file."""
        with self._lock:
            if path in self._seen:
                return
            self._seen.add(path)
            self._reasons[reason] += 1
        log.warning("%s: decoded by PyAV: %s%s", path, reason, f" ({detail})" if detail else "")

    def count(self) -> int:
        """Number of files."""
        return len(self._seen)

    def reasons(self) -> dict[str, int]:
        """Number of files by reason."""
        with self._lock:
            return dict(self._reasons)

    def clear(self) -> None:
        """Forget all files."""
        with self._lock:
            self._seen.clear()
            self._reasons.clear()


# Those of this process.
fallbacks = Fallbacks()
