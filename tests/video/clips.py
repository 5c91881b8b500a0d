"""Tiny clips encoded on the fly; each frame shows its own index, which reveals a wrong one."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT = 64, 48


def picture(index: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """RGB uint8 [H, W, 3]: red top-left corner, the index as 8 bars of light below it."""
    image = np.full((height, width, 3), 40, np.uint8)
    image[: height // 3, : width // 3] = (255, 0, 0)
    for bit in range(8):
        if index >> bit & 1:
            left = bit * width // 8
            image[height // 2 :, left : left + width // 8] = 230
    return image


def shown_index(frame: np.ndarray) -> int:
    """The index that `picture` drew, from a decoded upright RGB frame [H, W, 3]."""
    height, width = frame.shape[:2]
    row = frame[height // 2 + height // 4]
    return sum(
        1 << bit for bit in range(8) if row[(2 * bit + 1) * width // 16].astype(int).mean() > 135
    )


def write_silence(path: Path) -> None:
    """A file with audio only."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for i in range(8):
            silence = np.zeros((1, 1024), np.float32)
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, i * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def encode(
    path: Path,
    num_frames: int,
    *,
    codec: str = "libx264",
    fps: int | Fraction = 10,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    mux_options: dict[str, str] | None = None,
    pts: list[int] | None = None,
    first: int = 0,
    format: str | None = None,
) -> Path:
    """Write the pictures from index `first` on; pts in hundredths of a second."""
    with av.open(str(path), "w", format=format, options=mux_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        if pts is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 100)
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(first + i, *size), format="rgb24")
            frame.pts = i if pts is None else pts[i]
            frame.time_base = Fraction(1, fps) if pts is None else Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def set_display_matrix(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Write (a, b, c, d) of the display matrix into an MP4's track header."""
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
