"""How fast a run is: videos, frames, waiting for data, and the share of the device's peak."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from v2l_fast.training.flops import StepCost
from v2l_fast.training.loader import StepBatch


class Speed:
    """Counts this process's steps since the last time someone asked.

    Args:
        cost: operations of a video.
        peak: FLOP/s of one device, None where it is not known.
        processes: how many count.
    """

    def __init__(self, cost: StepCost, peak: float | None, processes: int) -> None:
        self.cost, self.peak, self.processes = cost, peak, processes
        self.sums, self.since = [0.0] * 5, time.perf_counter()

    def add(self, batch: StepBatch) -> None:
        """A step that was enqueued."""
        samples = batch.samples
        new = (
            len(samples),
            sum(sample.frames for sample in samples),
            batch.waited,
            sum(sample.decode_seconds for sample in samples),
            sum(self.cost.sample(sample) for sample in samples),
        )
        self.sums = [old + value for old, value in zip(self.sums, new, strict=True)]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training: its time does not count."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def take(self, total: Callable[[Sequence[float]], list[float]]) -> dict[str, float | None]:
        """Rates since the last call; `total` adds numbers over the processes."""
        seconds = max(time.perf_counter() - self.since, 1e-9)
        videos, frames, waited, decoded, flops = total(self.sums)
        self.sums, self.since = [0.0] * 5, time.perf_counter()
        mfu = None if self.peak is None else flops / seconds / self.peak / self.processes
        return {
            "samples_per_second": videos / seconds,
            "frames_per_second": frames / seconds,
            "decode_wait": waited / seconds / self.processes,
            "decode_seconds_per_video": decoded / max(videos, 1),
            "mfu": mfu,
        }
