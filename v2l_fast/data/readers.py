"""How the videos of a manifest are read, and the training samples that reading gives.

Training, the feature cache, the teacher and corpora share one :class:`ClipReader`, so all of them
see the same frames. A :class:`Sample` travels from data workers to the training step: CPU tensors
and plain lists that pickle; no model has seen it yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from v2l_fast.data.manifest import VideoExamples
from v2l_fast.errors import VideoError
from v2l_fast.pipeline import Context
from v2l_fast.video import Clip, FrameSampling, Limits
from v2l_fast.video.preprocess import frame_tiles
from v2l_fast.video.reader import Backend, load_spans
from v2l_fast.vlm import VideoChunk, iter_views
from v2l_fast.work_units import run_to_completion

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ClipReader:
    """Reads clips of videos and their chunks.

    Attributes:
        sampling: frames of each chunk, and their size.
        seconds: longest time that one file may take; beyond it the file counts as unreadable.
        decoder, device: as `backend` and `device` of :func:`~v2l_fast.video.load_video`.
    """

    sampling: FrameSampling
    seconds: float = 60.0
    decoder: Backend = "auto"
    device: str = "cpu"

    def read(self, video: VideoExamples, chunks: int = 1, hash_file: bool = True) -> list[Clip]:
        """The video (or its span) in `chunks` consecutive parts.

        hash_file: as of :func:`~v2l_fast.video.load_spans`.

        Raises:
            VideoError: the file cannot be read, or not in time.
        """
        try:
            return load_spans(
                video.path,
                self.sampling,
                video.span,
                chunks,
                limits=Limits(max_seconds=self.seconds),
                backend=self.decoder,
                device=self.device,
                hash_file=hash_file,
            )
        except OSError as error:
            raise VideoError(f"{video.path}: cannot be read ({error.strerror or error})") from None

    def views(
        self, video: VideoExamples, chunks: int, tile_size: int, resize: bool = True
    ) -> list[VideoChunk]:
        """:meth:`read`, resized and tiled for a vision tower of `tile_size`.

        resize: False leaves that to the model's device and gives frames, where they have fewer
        bytes than their views (at 384 pixels of 16:9, a third of those of 512).
        """
        clips, edge = self.read(video, chunks, hash_file=False), self.sampling.longest_edge
        results = []
        for clip in clips:
            height, width = clip.frames.shape[-2:]
            rows, cols = frame_tiles(height, width, edge, tile_size)
            if resize or height * width > (rows * cols + 1) * tile_size**2:
                results.append(run_to_completion(iter_views(clip, edge, tile_size)))
            else:
                indices = tuple(clip.indices.tolist())
                results.append(
                    VideoChunk(
                        clip.frames, clip.timestamps, clip.duration, rows, cols, indices, edge
                    )
                )
        return results


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


def read_ahead(
    read: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int | None = None
) -> Iterator[Result]:
    """`read(item)` of every item in order, computed by `threads` threads up to `ahead` items early.

    An exception of `read` is raised when its item is due.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(read, item))
                if len(pending) > (ahead or 2 * threads):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
