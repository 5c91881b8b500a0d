"""A span of a video as a file of its own, for tools that need one; ours read spans as they are."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import numpy as np

from v2l_fast.errors import VideoError
from v2l_fast.video.limits import Limits
from v2l_fast.video.reading import open_source
from v2l_fast.video.spans import frames_of_span

# Frames decoded and encoded at a time.
_BATCH = 32


def cut_span(
    path: str | os.PathLike,
    span: tuple[float, float],
    target: str | os.PathLike,
    limits: Limits | None = None,
) -> Path:
    """Write the frames `load_spans` sees in `span` (seconds) to an H.264 file, upright, no sound.

    Re-encoded at high quality, for a cut is rarely at a keyframe; an odd last row or column is
    lost. The file appears whole or not at all.

    Raises VideoError as `load_spans` does, and when the target cannot be written.
    """
    import av

    source = open_source(path, "pyav", limits or Limits())
    info = source.info
    first, stop = frames_of_span(source.path, info.num_frames, info.fps, span)
    target = Path(target)
    part = target.with_name(f".{target.stem}.{os.getpid()}.part{target.suffix}")
    width, height = info.width // 2 * 2, info.height // 2 * 2
    try:
        with av.open(str(part), "w") as container:
            stream = container.add_stream(
                "libx264", rate=Fraction(info.fps).limit_denominator(1001)
            )
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.options = {"crf": "18", "preset": "veryfast"}
            for begin in range(first, stop, _BATCH):
                decoded = source.read(np.arange(begin, min(stop, begin + _BATCH)))
                for frame in decoded.frames[:, :height, :width].contiguous().numpy():
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                if decoded.available is not None:
                    break
            container.mux(stream.encode())
        os.replace(part, target)
    except OSError as error:
        raise VideoError(f"{target}: cannot be written ({error.strerror or error})") from None
    finally:
        part.unlink(missing_ok=True)
    return target
