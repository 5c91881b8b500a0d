"""The two calls that touch a file: probe it, and decode frames of it.

Responsible for choosing the library that does it and for checking the indices asked for.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from v2l_fast.errors import VideoError
from v2l_fast.video.info import VideoInfo
from v2l_fast.video.limits import Limits

if TYPE_CHECKING:
    from v2l_fast.video.pyav_source import PyAVSource

log = logging.getLogger(__name__)

Backend = Literal["auto", "pyav", "torchcodec", "dali"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


def open_source(
    path: str | os.PathLike, backend: Backend, limits: Limits, device: str | torch.device = "cpu"
) -> PyAVSource:
    """The reader of `path` for frames that are wanted on `device`.

    "auto" is PyAV, which is always there and is the reference; for a GPU it is DALI where that is
    installed, and PyAV for each file DALI does not decode exactly (see `fallbacks`). The others
    give an error for a file they cannot decode. Only DALI's frames are on the device already.

    Raises VideoError for an unknown backend.
    """
    # The libraries load when a file is read: frames in memory need none of them.
    fallback = backend == "auto"
    backend = resolved(backend, device)
    if backend == "pyav":
        from v2l_fast.video.pyav_source import PyAVSource

        return PyAVSource(path, limits)
    if backend == "torchcodec":
        from v2l_fast.video.torchcodec_source import TorchcodecSource

        return TorchcodecSource(path, limits)
    if backend == "dali":
        from v2l_fast.video.dali_source import DaliSource

        return DaliSource(path, limits, torch.device(device), fallback)
    raise VideoError(
        f"{os.fspath(path)}: unknown backend {backend!r}; use one of {', '.join(BACKENDS)}"
    )


def resolved(backend: Backend, device: str | torch.device) -> Backend:
    """What "auto" means for frames that are wanted on `device`; another backend as it is."""
    if backend != "auto":
        return backend
    return "dali" if torch.device(device).type == "cuda" and _has_dali() else "pyav"


@cache
def _has_dali() -> bool:
    """Whether DALI is installed; says once that a GPU could be decoding."""
    found = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
    if not found:
        log.warning(
            'videos are decoded on the CPU: DALI is not installed; pip install "v2l_fast[dali]"'
        )
    return found


def probe(path: str | os.PathLike, limits: Limits | None = None) -> VideoInfo:
    """Describe a file by walking all its packets and decoding its first frame.

    Raises VideoError when the file is missing, not a video, without a decodable frame, or beyond
    `limits` (default: Limits()).
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

    An index the file counts but cannot deliver (damaged packets) gives the last frame that
    decodes, and a warning is logged. Raises VideoError as `probe` does, and for no indices or
    some outside 0..num_frames-1.
    """
    source = open_source(path, backend, limits or Limits(), device)
    asked = np.asarray(indices, dtype=np.int64).reshape(-1)
    count = source.info.num_frames
    if asked.size == 0 or asked.min() < 0 or asked.max() >= count:
        raise VideoError(
            f"{source.path}: it has frames 0..{count - 1}, asked for "
            f"{f'{asked.min()}..{asked.max()}' if asked.size else 'none'}"
        )
    unique, inverse = np.unique(asked, return_inverse=True)
    decoded = source.read(unique)
    if decoded.available is not None:
        log.warning(
            "%s: only %d of %d frames decode, the last one stands for the rest",
            source.path, decoded.available, count,
        )  # fmt: skip
        # Clamping can ask for a frame that was not among the indices.
        unique, inverse = np.unique(np.minimum(asked, decoded.available - 1), return_inverse=True)
        decoded = source.read(unique)
    if len(asked) == len(unique) and bool((np.diff(asked) > 0).all()):
        return decoded.frames.to(device)
    return decoded.frames.to(device)[torch.from_numpy(inverse).to(device)]
