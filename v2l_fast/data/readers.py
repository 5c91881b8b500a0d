"""How the videos of a manifest are read.

Training, the feature cache, the teacher and corpora share one :class:`ClipReader`, so all of them
see the same frames.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from v2l_fast.data.manifest import VideoExamples
from v2l_fast.errors import VideoError
from v2l_fast.video import Clip, FrameSampling, Limits
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

    def read(self, video: VideoExamples, chunks: int = 1) -> list[Clip]:
        """The video (or its span) in `chunks` consecutive parts.

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
            )
        except OSError as error:
            raise VideoError(f"{video.path}: cannot be read ({error.strerror or error})") from None

    def views(self, video: VideoExamples, chunks: int, tile_size: int) -> list[VideoChunk]:
        """:meth:`read`, resized and tiled for a vision tower of `tile_size`."""
        return [
            run_to_completion(iter_views(clip, self.sampling.longest_edge, tile_size))
            for clip in self.read(video, chunks)
        ]


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
