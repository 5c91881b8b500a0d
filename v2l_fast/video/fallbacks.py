"""Files that were not decoded by the library asked for: why, and how many.

A fallback gives the right frames, slower; whoever decodes a corpus wants to know of it.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter

log = logging.getLogger(__name__)


class Fallbacks:
    """A thread-safe tally. Each file is logged once and counted once, however often it is read.

    A process counts its own: data workers do not add to their parent's.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: set[str] = set()
        self._reasons: Counter[str] = Counter()

    def add(self, path: str, reason: str, detail: str = "") -> None:
        """Note that `path` was read by PyAV. reason: one of few; detail: of this file."""
        with self._lock:
            if path in self._seen:
                return
            self._seen.add(path)
            self._reasons[reason] += 1
        log.warning("%s: decoded by PyAV: %s%s", path, reason, f" ({detail})" if detail else "")

    def count(self) -> int:
        """Files so far."""
        return len(self._seen)

    def reasons(self) -> dict[str, int]:
        """Files so far by reason."""
        with self._lock:
            return dict(self._reasons)

    def clear(self) -> None:
        """Start anew."""
        with self._lock:
            self._seen.clear()
            self._reasons.clear()


# Of this process.
fallbacks = Fallbacks()
