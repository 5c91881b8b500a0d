"""Lossless VP9 clips of flat patches with chosen YCbCr values, which only conversion changes."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

PATCH = 32
# Y, Cb, Cr: greys, both ends, and colors that BT.601 keeps within 0..255 under every tag.
INSIDE = np.array(
    [[40, 128, 128], [128, 128, 128], [220, 128, 128], [120, 118, 140], [140, 150, 116],
     [100, 110, 120], [160, 120, 150], [90, 140, 135]], np.uint8
)  # fmt: skip
# BT.709's pure red, green, blue and yellow (limited range), of which BT.601 clips channels.
PRIMARIES = np.array([[63, 102, 240], [173, 42, 26], [32, 240, 118], [219, 16, 138]], np.uint8)


def encode_patches(path: Path, colors: np.ndarray, options: dict[str, str]) -> Path:
    """One row of patches, three frames. options: of the encoder, color tags among them."""
    height, width = PATCH, PATCH * len(colors)
    luma = np.repeat(np.repeat(colors[None, :, 0], PATCH, 1), height, 0)
    chroma = [
        np.repeat(np.repeat(colors[None, :, c], PATCH // 2, 1), height // 2, 0) for c in (1, 2)
    ]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=10, options={"lossless": "1"} | options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(3):
            frame = av.VideoFrame(width, height, "yuv420p")
            for plane, values in zip(frame.planes, (luma, *chroma), strict=True):
                padded = np.zeros((plane.height, plane.line_size), np.uint8)
                padded[:, : values.shape[1]] = values
                plane.update(padded.tobytes())
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def centers(frame: np.ndarray) -> np.ndarray:
    """Each patch's color, int [patches, 3]; the patch must be flat away from its edges."""
    count = frame.shape[1] // PATCH
    patches = frame.reshape(PATCH, count, PATCH, 3)[8:-8, :, 8:-8].astype(int)
    assert (np.ptp(patches, axis=(0, 2)) == 0).all()
    return patches[0, :, 0]
