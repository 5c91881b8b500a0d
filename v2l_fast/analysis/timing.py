"""Wall-clock seconds and peak memory of pieces of work, on the CPU and on a GPU."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def finished(device: torch.device) -> float:
    """The clock once everything enqueued on the device is done, seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(device: torch.device, work: Callable[[], Result]) -> tuple[Result, float]:
    """What ``work`` returns and the seconds it took."""
    start = finished(device)
    result = work()
    return result, finished(device) - start


class Stopwatch:
    """Seconds of each stage, as a progress callback: a report ends the stage before it.

    Attributes:
        seconds: stage -> seconds so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._stage: str | None = None
        self._since = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.stop()
        self._stage = stage

    def stop(self) -> None:
        """End the stage that runs."""
        now = finished(self._device)
        if self._stage is not None:
            self.seconds[self._stage] += now - self._since
        self._stage, self._since = None, now


class PeakMemory:
    """Peak memory within a ``with`` block.

    On a GPU what the allocator held at most; on a CPU the process's largest resident set, where
    the system lets a process reset it (Linux).

    Attributes:
        bytes: known behind the block; None where it cannot be measured.
    """

    bytes: int | None = None

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._measured = True

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return self
        try:
            _RESET.write_text("5")
        except OSError:
            self._measured = False
        return self

    def __exit__(self, *failure: object) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device)
        elif self._measured:
            (line,) = (x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM:"))
            self.bytes = int(line.split()[1]) * 1024
