"""Training samples: one video with its contexts and its questions and answers as token ids.

Samples travel from data workers to the training step: CPU tensors and plain lists that pickle. A
:class:`Source` produces them; no model has seen them yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from v2l_fast.pipeline import Context


@dataclass(frozen=True)
class Sample:
    """One video of a batch.

    Attributes:
        video: its name, for logs and the quarantine.
        chunks: contexts of its chunks in temporal order, at least one.
        prompt_prefix: token ids all questions start with (the opening of the text-only prompt).
        qa_pairs: (token ids after the prefix up to where the answer starts, answer ids with the
            stop token), at least one.
        task_types: task of each pair (caption, qa, ...), for weights and logs.
        frames: number of frames sampled from the video.
        decode_seconds: time spent reading it.
        teacher_prefix: replaces `prompt_prefix` for a KL teacher, with the video in context (image
            tokens included); None without such a teacher.
    """

    video: str
    chunks: tuple[Context, ...]
    prompt_prefix: list[int]
    qa_pairs: tuple[tuple[list[int], list[int]], ...]
    task_types: tuple[str, ...]
    frames: int = 0
    decode_seconds: float = 0.0
    teacher_prefix: list[int] | None = None

    def __post_init__(self) -> None:
        if not self.chunks or not self.qa_pairs or len(self.task_types) != len(self.qa_pairs):
            raise ValueError(
                f"{self.video}: needs at least one chunk, one question and a task type for each "
                f"question, got {len(self.chunks)}, {len(self.qa_pairs)} and "
                f"{len(self.task_types)}"
            )

    def pin_memory(self) -> Sample:
        """The same with its contexts in page-locked memory (a DataLoader calls this)."""
        return replace(self, chunks=tuple(chunk.pin_memory() for chunk in self.chunks))


@dataclass(frozen=True)
class Failure:
    """A video that could not be read, and why."""

    video: str
    reason: str


class Source(Protocol):
    """Videos to train on. Picklable: data workers call it, on the CPU.

    If its attribute `on_gpu` is true, threads of the training process call it instead.
    """

    def __len__(self) -> int:
        """Number of videos, the unit of an epoch."""
        ...

    def load(self, index: int, step: int) -> Sample | Failure:
        """Video `index` as step `step` sees it; random choices depend on (seed, step, index)."""
        ...
