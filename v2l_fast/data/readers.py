"""From a manifest's video to clips and views: how videos are read wherever a manifest is.

Responsible for one set of sampling settings shared by training, the feature cache, the teacher and
corpora, so that all of them see the same frames.
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
from v2l_fast.video.reading import Backend
from v2l_fast.video.spans import load_spans
from v2l_fast.vlm import VideoChunk, iter_views
from v2l_fast.work_units import run_to_completion

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ClipReader:
    """Reads videos.

    Attributes:
        max_frames, target_fps, exact_frames: sampling of each chunk, see
            :func:`~v2l_fast.video.sample_indices`.
        longest_edge: resolution in pixels.
        seconds: longest time one file may take; beyond it the file counts as unreadable.
        decoder, device: what decodes, and where clips and views are, see
            :func:`~v2l_fast.video.load_video`.
    """

    max_frames: int
    longest_edge: int
    target_fps: float = 1.0
    exact_frames: bool = False
    seconds: float = 60.0
    decoder: Backend = "auto"
    device: str = "cpu"

    @classmethod
    def of(
        cls,
        sampling: FrameSampling,
        seconds: float = 60.0,
        decoder: Backend = "auto",
        device: str = "cpu",
    ) -> ClipReader:
        """A reader of these frames."""
        return cls(
            sampling.max_frames, sampling.longest_edge, sampling.target_fps,
            sampling.exact_frames, seconds, decoder, device,
        )  # fmt: skip

    def read(self, video: VideoExamples, chunks: int = 1) -> list[Clip]:
        """The video (or its span) in `chunks` parts in the order of time.

        Raises:
            VideoError: it cannot be read, in time or at all.
        """
        try:
            return load_spans(
                video.path,
                video.span,
                chunks,
                self.max_frames,
                self.target_fps,
                exact_frames=self.exact_frames,
                limits=Limits(max_seconds=self.seconds),
                backend=self.decoder,
                longest_edge=self.longest_edge,
                device=self.device,
            )
        except OSError as error:
            raise VideoError(f"{video.path}: cannot be read ({error.strerror or error})") from None

    def views(self, video: VideoExamples, chunks: int, tile_size: int) -> list[VideoChunk]:
        """:meth:`read`, resized and tiled for a vision tower of `tile_size`."""
        return [
            run_to_completion(iter_views(clip, self.longest_edge, tile_size))
            for clip in self.read(video, chunks)
        ]


def read_ahead(
    read: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int | None = None
) -> Iterator[Result]:
    """`read` of every item in order, computed by `threads` threads up to `ahead` items early.

    An exception of `read` is raised when its item's turn comes.
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
