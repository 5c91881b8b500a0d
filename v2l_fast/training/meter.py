"""What the steps since the last log line measured, kept on the device until someone asks.

Responsible for means over steps and processes that come out the same, to the last bit, whether the
run was interrupted in between or not: every step's numbers are added over the processes in order of
rank, then the steps in order of time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from v2l_fast.training.step import StepResult

# Name -> [sum, number].
Sums = dict[str, list[float]]


class Meter:
    """Collects one entry a step; `state` and `restore` carry an unfinished interval over.

    Args:
        counts: this process's entries count as steps (one process's do).
    """

    def __init__(self, counts: bool = True) -> None:
        self._counts = float(counts)
        self._merged: list[Sums] = []
        self._pending: list[dict[str, Tensor]] = []

    def add(self, results: list[StepResult], norm: Tensor) -> None:
        """One step: its micro-batches on this process, each with its part of the batch's loss,
        and the norm of the whole batch's gradient."""
        loss = torch.stack([result.loss.detach().float() for result in results]).sum()
        entry = {"loss": self._entry(loss), "grad_norm": self._entry(norm.float() * self._counts)}
        for result in results:
            for kind, pair in result.parts.items():
                entry[kind] = entry[kind] + pair if kind in entry else pair
        self._pending.append(entry)

    def merge(self, gather: Callable[[list[Sums]], list[list[Sums]]]) -> None:
        """Bring the pending steps of all processes to the host: the one wait for the device.

        gather: a value to the list of every process's, in order of rank.
        """
        flat = [pair for entry in self._pending for pair in entry.values()]
        values = iter(torch.stack(flat).tolist() if flat else [])
        own = [{name: next(values) for name in entry} for entry in self._pending]
        self._pending = []
        for step in zip(*gather(own), strict=True):
            self._merged.append(added(step))

    def bad_step(self) -> int | None:
        """How many steps ago a merged loss or gradient was first not finite, or None."""
        for place, step in enumerate(self._merged):
            if not all(math.isfinite(step[name][0]) for name in ("loss", "grad_norm")):
                return len(self._merged) - 1 - place
        return None

    def means(self) -> dict[str, float]:
        """Means over the merged steps, which are then forgotten."""
        sums = added(self._merged)
        self._merged = []
        return means(sums)

    def state(self) -> list[Any]:
        """The merged steps, JSON-ready."""
        return self._merged

    def restore(self, state: list[Any]) -> None:
        """Continue the interval of `state`."""
        self._merged = state

    def _entry(self, value: Tensor) -> Tensor:
        return torch.stack([value, torch.full_like(value, self._counts)])


def added(parts: Any) -> Sums:
    """Sums and numbers by name, added in order."""
    total: Sums = {}
    for part in parts:
        for name, (value, number) in part.items():
            pair = total.setdefault(name, [0.0, 0.0])
            pair[0] += value
            pair[1] += number
    return total


def means(sums: Sums) -> dict[str, float]:
    """Sum over number of each name."""
    return {name: value / max(number, 1.0) for name, (value, number) in sums.items()}
