"""Videos that could not be read: listed in a file of the run, and not tried again.

The file is also how the processes of a run tell each other.
"""

from __future__ import annotations

from pathlib import Path

import torch

from v2l_fast.data.samples import Failure
from v2l_fast.training.records import append_line, read_lines


class Quarantine:
    """The broken videos of a source.

    Args:
        path: the list, JSON lines of video, reason, step (the one whose read failed; workers read
            ahead of each other) and index.
        videos: number of videos of the source.

    Attributes:
        broken: bool [videos], in memory that worker processes share.
    """

    def __init__(self, path: Path, videos: int) -> None:
        self.path = path
        self.broken = torch.zeros(videos, dtype=torch.bool).share_memory_()
        self._size = 0
        self._listed: set[int] = set()

    def __len__(self) -> int:
        self.refresh()
        return len(self._listed)

    def refresh(self) -> None:
        """Know what the file lists by now; costs a look at its size when nothing is new."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size != self._size:
            self._size = size
            self._listed = {line["index"] for line in read_lines(self.path)}
            self.broken[sorted(self._listed)] = True

    def add(self, index: int, failure: Failure, step: int) -> None:
        """List a video that failed in `step`, unless it is listed already."""
        self.broken[index] = True
        self.refresh()
        if index not in self._listed:
            reason = failure.reason.splitlines()[0] if failure.reason else "unknown"
            line = {"video": failure.video, "reason": reason, "step": step, "index": index}
            append_line(self.path, line)
            self.refresh()
