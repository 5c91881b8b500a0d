"""Order of the training examples: seeded epochs without replacement, with a position to resume."""

from __future__ import annotations

import torch


class EpochSampler:
    """Endless batches of example indices.

    Each epoch is a permutation that depends on (seed, epoch) alone. The last short batch of an
    epoch is filled from the next one, so every batch has the same size.
    """

    def __init__(self, examples: int, batch: int, seed: int) -> None:
        self.examples, self.batch, self.seed = examples, batch, seed
        self.epoch, self.position = 0, 0
        self._order = self._permutation(0)

    def next(self) -> list[int]:
        """The next batch of indices."""
        picked: list[int] = []
        while len(picked) < self.batch:
            if self.position == self.examples:
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._permutation(self.epoch)
            end = min(self.examples, self.position + self.batch - len(picked))
            picked += self._order[self.position : end]
            self.position = end
        return picked

    def state(self) -> dict[str, int]:
        """What `restore` needs, JSON-ready."""
        return {"epoch": self.epoch, "position": self.position}

    def restore(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken."""
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._permutation(self.epoch)

    def _permutation(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.examples, generator=generator).tolist()
