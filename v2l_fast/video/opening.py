"""Opening a file that may be hostile or broken, and saying in one line why it cannot be opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from v2l_fast.errors import VideoError
from v2l_fast.video.limits import Deadline, Limits

# Files only, and no format that makes FFmpeg open other files or addresses (playlists, concat
# scripts): the name and content of an uploaded file are not to be trusted.
_FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,gif,apng,mxf,nut,ivf,rm,wtv,"
    "h264,hevc,av1,obu,m4v,mjpeg,y4m,yuv4mpegpipe,dv,3gp"
)


@contextmanager
def open_stream(
    path: str, limits: Limits, deadline: Deadline
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The opened file and its first video stream (a song's cover picture is none).

    Raises VideoError when it cannot be opened, has no such stream, no decoder for it, frames
    beyond limits.max_pixels, or when the deadline passes.
    """
    left = deadline.remaining()
    try:
        container = av.open(
            os.path.abspath(path),
            options={"format_whitelist": _FORMATS, "protocol_whitelist": "file"},
            metadata_errors="replace",
            timeout=(left, left),
        )
    except (av.FFmpegError, ValueError, OSError) as error:
        deadline.check()
        raise VideoError(f"{path}: {_why_not_opened(path, error)}") from error
    with container:
        stream = next((s for s in container.streams.video if not _is_cover(s)), None)
        if stream is None:
            kinds = ", ".join(sorted({s.type for s in container.streams})) or "no streams"
            raise VideoError(f"{path}: no video stream in it ({kinds} only)")
        if stream.codec_context is None:
            raise VideoError(f"{path}: FFmpeg has no decoder for its video; re-encode it as H.264")
        check_size(path, stream.codec_context.width, stream.codec_context.height, limits)
        # The decoder refuses larger frames too, before it makes room for one.
        stream.codec_context.options = {"max_pixels": str(limits.max_pixels)}
        yield container, stream


def check_size(path: str, width: int, height: int, limits: Limits) -> None:
    """Raise VideoError when frames pass limits.max_pixels."""
    if width * height > limits.max_pixels:
        raise VideoError(
            f"{path}: frames of {width}x{height} are more than {limits.max_pixels} pixels; "
            "scale it down or raise Limits.max_pixels"
        )


def check_file(path: str) -> None:
    """Raise VideoError unless `path` is a readable regular file with something in it."""
    file = Path(path)
    if not file.exists():
        raise VideoError(f"{path}: no such file")
    if file.is_dir():
        raise VideoError(f"{path}: a directory, not a video file")
    if not file.is_file():
        raise VideoError(f"{path}: not a regular file; copy the video to one")
    if not os.access(path, os.R_OK):
        raise VideoError(f"{path}: not readable; check its permissions")
    if file.stat().st_size == 0:
        raise VideoError(f"{path}: an empty file (0 bytes)")


def _why_not_opened(path: str, error: Exception) -> str:
    """FFmpeg's own words are generic; an MP4 without its index is common and worth naming."""
    with open(path, "rb") as file:
        boxes = _top_level_boxes(file)
    if "ftyp" in boxes and "moov" not in boxes:
        return "an MP4 without its index (moov): truncated or never finished; get it again"
    reason = getattr(error, "strerror", None) or str(error)
    return f"not a video that can be read ({reason}); re-encode it or check what it is"


def _top_level_boxes(file: BinaryIO) -> list[str]:
    """Names of an ISO base media file's outer boxes that are there in full."""
    names: list[str] = []
    length = os.fstat(file.fileno()).st_size
    while len(head := file.read(16)) >= 8 and len(names) < 1000:
        size, name = int.from_bytes(head[:4], "big"), head[4:8].decode("latin-1")
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        if size < 8 or file.tell() - len(head) + size > length:
            break
        names.append(name)
        file.seek(size - len(head), os.SEEK_CUR)
    return names


def _is_cover(stream) -> bool:
    """A song's cover picture is a video stream to FFmpeg."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)
