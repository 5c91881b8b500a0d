"""Files to clips: a whole video, or parts of it as clips of their own, without cutting the file.

A part reads as if its frames had been cut into a file: its times count from its start, its duration
is its own. Only `indices` and the hash are the whole file's.
"""

from __future__ import annotations

import math
import os
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from v2l_fast.errors import VideoError
from v2l_fast.files import file_sha256
from v2l_fast.video.clip import Clip
from v2l_fast.video.limits import Limits
from v2l_fast.video.preprocess import resize_lanczos, resized_size
from v2l_fast.video.reading import Backend, open_source
from v2l_fast.video.sampling import MAX_EDGE, FrameSampling

if TYPE_CHECKING:
    from v2l_fast.video.pyav_source import Decoded


def load_video(
    path: str | os.PathLike,
    max_frames: int,
    target_fps: float = 1.0,
    exact_frames: bool = False,
    limits: Limits | None = None,
    backend: Backend = "auto",
    longest_edge: int | None = None,
    device: str | torch.device = "cpu",
    sha256: str | None = None,
) -> Clip:
    """Sample (see `sample_indices`) and decode a file.

    longest_edge: shrink each frame as it is decoded to `resized_size(.., longest_edge)`, the first
    step of `frame_views`, whose result for the same longest_edge is unchanged; keeps memory small
    when many frames are taken.
    device: where the frames go; with backend "auto" a GPU decodes them where it can.
    sha256: hash of the file's bytes if it is known; otherwise the file is hashed.

    Where fewer frames decode than the file counts, sampling is done again over those that do.
    Raises VideoError as `probe` and `decode` do, ConfigError as `sample_indices` does.
    """
    sampling = FrameSampling(
        max_frames, MAX_EDGE if longest_edge is None else longest_edge, target_fps, exact_frames
    )
    (clip,) = load_spans(
        path,
        sampling,
        limits=limits,
        backend=backend,
        device=device,
        sha256=sha256,
        resize=longest_edge is not None,
    )
    return clip


def load_spans(
    path: str | os.PathLike,
    sampling: FrameSampling,
    span: tuple[float, float] | None = None,
    chunks: int = 1,
    limits: Limits | None = None,
    backend: Backend = "auto",
    device: str | torch.device = "cpu",
    sha256: str | None = None,
    resize: bool = True,
) -> list[Clip]:
    """`span` of a file (seconds, None for all of it) in `chunks` equal parts, one clip each.

    sampling: applied to every part as `load_video` does to a file; `longest_edge` shrinks frames
    unless `resize` is False.

    A frame belongs to a span when it is shown at start <= t < end; an end beyond the file is the
    file's. A span of fewer frames than `chunks` gives as many clips as it has frames. The file is
    read in one pass.

    Raises VideoError as `load_video` does, and when no frame lies in the span.
    """
    source = open_source(path, backend, limits or Limits(), device)
    info = source.info
    transform = partial(_shrink, longest_edge=sampling.longest_edge) if resize else None

    def read(count: int) -> tuple[list[tuple[int, int]], list[np.ndarray], Decoded]:
        parts = _parts(*frames_of_span(source.path, count, info.fps, span), chunks)
        picked = [
            first + sampling.indices(stop - first, info.fps, (stop - first) / info.fps)
            for first, stop in parts
        ]  # fmt: skip
        # Parts follow each other, so their indices together are sorted and unique.
        return parts, picked, source.read(np.concatenate(picked), transform)

    count = info.num_frames
    parts, picked, decoded = read(count)
    if decoded.available is not None:
        count = decoded.available
        parts, picked, decoded = read(count)
    if sha256 is None:
        sha256 = file_sha256(source.path)
    frames = decoded.frames.to(device).permute(0, 3, 1, 2)
    clips = []
    start = 0
    for (first, stop), indices in zip(parts, picked, strict=True):
        here = slice(start, start + len(indices))
        start = here.stop
        clips.append(
            Clip(
                frames=frames[here].contiguous(),
                indices=indices,
                timestamps=tuple(float(i / info.fps) for i in indices - first),
                fps=info.fps,
                duration=(stop - first) / info.fps,
                num_frames=stop - first,
                sha256=sha256,
                path=source.path,
                presentation_times=decoded.times[here],
            )
        )
    return clips


def _shrink(image: torch.Tensor, longest_edge: int) -> torch.Tensor:
    """uint8 [..., H, W, 3] to the size `frame_views` would give it first, if that is smaller."""
    height, width = image.shape[-3:-1]
    small = resized_size(height, width, longest_edge)
    # Only where the size rule maps the small size to itself would frame_views agree.
    if small[0] * small[1] >= height * width or resized_size(*small, longest_edge) != small:
        return image
    return resize_lanczos(image.movedim(-1, -3), *small).movedim(-3, -1)


def frames_of_span(
    path: str, count: int, fps: float, span: tuple[float, float] | None
) -> tuple[int, int]:
    """[first, stop) of the frames shown in `span`, of `count` at `fps` frames/s.

    Raises VideoError when there is none.
    """
    if span is None:
        return 0, count
    # A time written with a few decimals is meant to hit a frame exactly.
    first, stop = (min(count, math.ceil(round(t * fps, 3))) for t in span)
    if first >= stop:
        raise VideoError(
            f"{path}: no frame is shown between {span[0]:g} and {span[1]:g} s; it has "
            f"{count} frames in {count / fps:.3f} s"
        )
    return first, stop


def _parts(first: int, stop: int, chunks: int) -> list[tuple[int, int]]:
    """[first, stop) in equal pieces of at least one frame."""
    chunks = min(chunks, stop - first)
    cuts = [first + (stop - first) * i // chunks for i in range(chunks + 1)]
    return list(zip(cuts[:-1], cuts[1:], strict=True))
