"""Writes frames as an H.264 file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from v2l_fast.files import replacing


def write_video(
    path: str | os.PathLike,
    frames: Iterable[np.ndarray],
    size: tuple[int, int],
    fps: Fraction,
    pix_fmt: str = "yuv420p",
    options: Mapping[str, str] | None = None,
    container_options: Mapping[str, str] | None = None,
) -> Path:
    """Write a video without sound, atomically; equal frames give equal bytes.

    Args:
        frames: RGB, uint8 [H, W, 3].
        size: (H, W).
        fps: exact rate, so that a copy's frames have the times of the original.
        options: of x264, in addition to a constant quality that keeps a test pattern within 38 dB.

    Raises:
        WriteError: the file cannot be written.
        av.FFmpegError: x264 does not accept the size.
    """
    path = Path(path)
    with (
        replacing(path, path.suffix) as part,
        av.open(str(part), "w", options=dict(container_options or {})) as container,
    ):
        stream = container.add_stream(
            "libx264", rate=fps, options={"preset": "veryfast", "crf": "18", **(options or {})}
        )
        stream.height, stream.width = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = number, 1 / fps
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
