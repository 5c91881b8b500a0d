"""What a trainer reads: videos with their contexts and turns, before any model has seen them.

Responsible for the data passed from DataLoader workers to the training step: CPU tensors and plain
lists that pickle. Where they come from is a `Source`'s business, what is computed from them
`v2l_fast.training.step`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from v2l_fast.pipeline import Context


@dataclass(frozen=True)
class Sample:
    """One video of a batch: at least one chunk and one turn.

    Attributes:
        video: its name, for logs and the quarantine.
        chunks: in the order of time.
        prefix: ids all turns start with (the opening of the text-only chat prompt).
        turns: (ids after the prefix up to where the answer starts, answer ids with the stop token).
        kinds: the task of each turn (captioning, qa, ...), for weights and logs.
        frames: sampled from the video.
        decode_seconds: spent on reading it.
        teacher_prefix: what stands in place of `prefix` for a model with the video in context,
            image tokens included, or None; for a KL teacher that sees the video.
        teacher_logits: stored logits [answer tokens, vocabulary] of each turn, or None.
    """

    video: str
    chunks: tuple[Context, ...]
    prefix: list[int]
    turns: tuple[tuple[list[int], list[int]], ...]
    kinds: tuple[str, ...]
    frames: int = 0
    decode_seconds: float = 0.0
    teacher_prefix: list[int] | None = None
    teacher_logits: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        if not self.chunks or not self.turns or len(self.kinds) != len(self.turns):
            raise ValueError(
                f"{self.video}: needs at least one chunk, one turn and a kind for each turn, "
                f"not {len(self.chunks)}, {len(self.turns)} and {len(self.kinds)}"
            )

    def pin_memory(self) -> Sample:
        """The same with its contexts in page-locked memory (a DataLoader calls this)."""
        return replace(self, chunks=tuple(chunk.pin_memory() for chunk in self.chunks))


@dataclass(frozen=True)
class Failure:
    """A video that could not be read: quarantined; the batch goes on without it."""

    video: str
    reason: str


class Source(Protocol):
    """Videos to train on. Picklable: DataLoader workers call it, on the CPU.

    A source whose attribute `on_gpu` is true is called by threads of the training process instead.
    """

    def __len__(self) -> int:
        """Number of videos, the unit of an epoch."""
        ...

    def load(self, index: int, step: int) -> Sample | Failure:
        """Video `index` as step `step` sees it; all randomness from (seed, step, index)."""
        ...
