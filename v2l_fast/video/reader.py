"""Reads video files: probes one, decodes frames by index, or samples clips of it or of its spans.

Responsible for choosing the library that decodes, for counting the files it leaves to PyAV, for
checking the requested indices, and for turning a span's seconds into frames.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from functools import cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from v2l_fast.errors import VideoError
from v2l_fast.files import file_sha256
from v2l_fast.video.clip import Clip
from v2l_fast.video.info import Limits, VideoInfo
from v2l_fast.video.preprocess import MAX_EDGE, FrameSampling, resize_lanczos, shrunk_size

if TYPE_CHECKING:
    from v2l_fast.video.packets import Packets
    from v2l_fast.video.pyav import Decoded, PyAVSource

log = logging.getLogger(__name__)

Backend = Literal["auto", "pyav", "torchcodec", "dali"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


def open_source(
    path: str | os.PathLike,
    backend: Backend,
    limits: Limits,
    device: str | torch.device = "cpu",
    packets: Packets | None = None,
) -> PyAVSource:
    """The reader of `path` for frames that go to `device`.

    "auto" is PyAV, which is the reference. For a GPU it is DALI if that is installed, and PyAV for
    each file that DALI does not decode exactly (see `fallbacks`). The other backends raise for a
    file that they cannot decode. Only DALI's frames are on the device already.

    packets: the file's packet table if it was read before, which saves a pass over the file; PyAV
    alone uses it.

    Raises VideoError for an unknown backend.
    """
    # The libraries are imported when a file is read: frames in memory need none of them.
    fallback = backend == "auto"
    backend = resolve_backend(backend, device)
    if backend == "pyav":
        from v2l_fast.video.pyav import PyAVSource

        return PyAVSource(path, limits, packets)
    if backend == "torchcodec":
        from v2l_fast.video.pyav import TorchcodecSource

        return TorchcodecSource(path, limits)
    if backend == "dali":
        from v2l_fast.video.dali import DaliSource

        return DaliSource(path, limits, torch.device(device), fallback)
    raise VideoError(
        f"{os.fspath(path)}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}"
    )


def resolve_backend(backend: Backend, device: str | torch.device) -> Backend:
    """The backend that "auto" selects for frames on `device`; another backend unchanged."""
    if backend != "auto":
        return backend
    return "dali" if torch.device(device).type == "cuda" and _has_dali() else "pyav"


@cache
def _has_dali() -> bool:
    """Whether DALI is installed; if not, warns once that videos are decoded on the CPU."""
    installed = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
    if not installed:
        log.warning(
            'videos are decoded on the CPU: DALI is not installed; pip install "v2l_fast[dali]"'
        )
    return installed


def probe(path: str | os.PathLike, limits: Limits | None = None) -> VideoInfo:
    """Describe a file, from all its packets and its first frame.

    Raises VideoError when the file is missing, is not a video, has no frame that decodes, or
    exceeds `limits` (default: Limits()).
    """
    return open_source(path, "pyav", limits or Limits()).info


def decode(
    path: str | os.PathLike,
    indices: Sequence[int] | np.ndarray,
    backend: Backend = "auto",
    limits: Limits | None = None,
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Frames `indices` (any order, repeats allowed), upright RGB, uint8 [F, H, W, 3] on `device`.

    An index that the file counts but whose frame does not decode (damaged packets) gives the last
    frame that does, with a warning. Raises VideoError as `probe` does, and for empty indices or
    indices outside 0..num_frames-1.
    """
    source = open_source(path, backend, limits or Limits(), device)
    requested = np.asarray(indices, dtype=np.int64).reshape(-1)
    count = source.info.num_frames
    if requested.size == 0 or requested.min() < 0 or requested.max() >= count:
        raise VideoError(
            f"{source.path}: indices must be in 0..{count - 1}, got "
            f"{f'{requested.min()}..{requested.max()}' if requested.size else 'none'}"
        )
    unique, inverse = np.unique(requested, return_inverse=True)
    decoded = source.read(unique)
    if decoded.available is not None:
        log.warning(
            "%s: only %d of %d frames decode, the last one replaces the rest",
            source.path, decoded.available, count,
        )  # fmt: skip
        # Clamping can select a frame that is not among the indices.
        unique, inverse = np.unique(
            np.minimum(requested, decoded.available - 1), return_inverse=True
        )
        decoded = source.read(unique)
    if len(requested) == len(unique) and bool((np.diff(requested) > 0).all()):
        return decoded.frames.to(device)
    return decoded.frames.to(device)[torch.from_numpy(inverse).to(device)]


# --- clips -----------------------------------------------------------------------------------


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

    longest_edge: resize each decoded frame to `resized_size(.., longest_edge)` if that is smaller.
    This is the first step of `frame_views`, whose result for the same longest_edge is unchanged; it
    saves memory when many frames are read.
    device: where the frames go; with backend "auto" a GPU decodes the files that it can.
    sha256: hash of the file's bytes if it is known; otherwise the file is hashed.

    If fewer frames decode than the file counts, sampling is repeated over those that do.
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
    packets: Packets | None = None,
    hash_file: bool = True,
) -> list[Clip]:
    """Read `span` of a file (seconds, None for all of it) as `chunks` equal parts, one clip each.

    A part reads as if its frames had been cut into a file: its times count from its start and its
    duration is its own. Only `indices` and the hash refer to the whole file.

    sampling: applied to every part as `load_video` does to a file; `longest_edge` resizes frames
    unless `resize` is False.

    packets: as in `open_source`.

    hash_file: False leaves `Clip.sha256` None unless `sha256` is given. To hash a long file takes
    longer than to read a span of it, and only an adapter's provenance needs the hash.

    A frame belongs to a span if it is shown at start <= t < end; an end beyond the file is the
    file's. A span of fewer frames than `chunks` gives as many clips as it has frames. The file is
    read in one pass.

    Raises VideoError as `load_video` does, and when the span has no frame.
    """
    source = open_source(path, backend, limits or Limits(), device, packets)
    info = source.info
    transform = partial(_shrink, longest_edge=sampling.longest_edge) if resize else None

    def read(count: int) -> tuple[list[tuple[int, int]], list[np.ndarray], Decoded]:
        parts = _parts(*frames_of_span(source.path, count, info.fps, span), chunks)
        indices = [
            first + sampling.indices(stop - first, info.fps, (stop - first) / info.fps)
            for first, stop in parts
        ]  # fmt: skip
        # Parts are consecutive, so their indices together are sorted and unique.
        return parts, indices, source.read(np.concatenate(indices), transform)

    count = info.num_frames
    parts, indices_of_parts, decoded = read(count)
    if decoded.available is not None:
        count = decoded.available
        parts, indices_of_parts, decoded = read(count)
    if sha256 is None and hash_file:
        sha256 = file_sha256(source.path)
    frames = decoded.frames.to(device).permute(0, 3, 1, 2)
    clips = []
    start = 0
    for (first, stop), indices in zip(parts, indices_of_parts, strict=True):
        part = slice(start, start + len(indices))
        start = part.stop
        clips.append(
            Clip(
                frames=frames[part].contiguous(),
                indices=indices,
                timestamps=tuple(float(i / info.fps) for i in indices - first),
                fps=info.fps,
                duration=(stop - first) / info.fps,
                num_frames=stop - first,
                sha256=sha256,
                path=source.path,
                presentation_times=decoded.times[part],
            )
        )
    return clips


def _shrink(image: torch.Tensor, longest_edge: int) -> torch.Tensor:
    """Resize uint8 [..., H, W, 3] as `frame_views` does first, if that makes it smaller."""
    height, width = image.shape[-3:-1]
    size = shrunk_size(height, width, longest_edge)
    if size == (height, width):
        return image
    return resize_lanczos(image.movedim(-1, -3), *size).movedim(-3, -1)


def frames_of_span(
    path: str, count: int, fps: float, span: tuple[float, float] | None
) -> tuple[int, int]:
    """[first, stop) of the frames shown in `span`, of `count` at `fps` frames/s.

    Raises VideoError when there is none.
    """
    if span is None:
        return 0, count
    # A time with a few decimals is meant to match a frame exactly.
    first, stop = (min(count, math.ceil(round(t * fps, 3))) for t in span)
    if first >= stop:
        raise VideoError(
            f"{path}: no frame is shown between {span[0]:g} and {span[1]:g} s; it has "
            f"{count} frames in {count / fps:.3f} s"
        )
    return first, stop


def _parts(first: int, stop: int, chunks: int) -> list[tuple[int, int]]:
    """Split [first, stop) into equal parts of at least one frame."""
    chunks = min(chunks, stop - first)
    cuts = [first + (stop - first) * i // chunks for i in range(chunks + 1)]
    return list(zip(cuts[:-1], cuts[1:], strict=True))
