"""Order of the training videos: seeded epochs without replacement, any step's batch at any time."""

from __future__ import annotations

from typing import TypeVar

import torch

T = TypeVar("T")


class EpochOrder:
    """Batches of video indices as a function of (seed, step) alone, so nothing must be restored.

    Each epoch is a permutation that depends on (seed, epoch). The last short batch of an epoch is
    filled from the next one, so every batch has the same size.
    """

    def __init__(self, videos: int, batch_size: int, seed: int) -> None:
        self.videos, self.batch_size, self.seed = videos, batch_size, seed
        self._epoch, self._order = -1, []

    def batch(self, step: int) -> list[int]:
        """Indices of the batch of 0-based `step`."""
        picked: list[int] = []
        place = step * self.batch_size
        while len(picked) < self.batch_size:
            epoch, start = divmod(place, self.videos)
            part = self._permutation(epoch)[start : start + self.batch_size - len(picked)]
            picked += part
            place += len(part)
        return picked

    def share(self, step: int, rank: int, processes: int) -> list[int]:
        """One process's part of the batch; the parts in order of rank are the batch."""
        return even_part(self.batch(step), rank, processes)

    def _permutation(self, epoch: int) -> list[int]:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(self.videos, generator=generator).tolist()
            self._epoch, self._order = epoch, order
        return self._order


def even_part(items: list[T], index: int, parts: int) -> list[T]:
    """Part `index` of `parts` whose lengths differ by at most one; in order they are `items`."""
    return items[len(items) * index // parts : len(items) * (index + 1) // parts]
