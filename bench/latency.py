"""Latencies of a long run in memory that does not grow: a histogram of 1% wide bins."""

from __future__ import annotations

import math

import numpy as np

LEAST, RATIO, BINS = 1e-6, 1.01, 2100


class Latencies:
    """Seconds, from a microsecond to twenty minutes."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, dtype=np.int64)

    def add(self, seconds: float) -> None:
        place = math.log(max(seconds, LEAST) / LEAST) / math.log(RATIO)
        self.counts[min(int(place), BINS - 1)] += 1

    def percentile(self, share: float) -> float:
        """Upper edge of the bin that ``share`` (0 to 1) of all lie within."""
        if not self.counts.any():
            return 0.0
        place = int(np.searchsorted(self.counts.cumsum(), share * self.counts.sum()))
        return LEAST * RATIO ** (place + 1)

    def summary(self) -> dict[str, float]:
        """Count and percentiles, seconds."""
        shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
        found = {name: self.percentile(share) for name, share in shares.items()}
        return {"count": int(self.counts.sum()), **found}
