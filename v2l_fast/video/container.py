"""Opens a file that may be hostile or broken, or says in one line why it cannot be opened."""

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
from v2l_fast.video.info import Deadline, Limits

# Files only, and no format that makes FFmpeg open other files or addresses (playlists, concat
# scripts): neither the name nor the content of an uploaded file can be trusted.
_FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,gif,apng,mxf,nut,ivf,rm,wtv,"
    "h264,hevc,av1,obu,m4v,mjpeg,y4m,yuv4mpegpipe,dv,3gp"
)


@contextmanager
def open_stream(
    path: str, limits: Limits, deadline: Deadline
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The opened file and its best video stream, by FFmpeg's own choice; never a cover picture.

    Raises VideoError when the file cannot be opened, has no such stream, no decoder for it or
    frames beyond limits.max_pixels, or when the deadline passes.
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
        stream = _best_stream(container)
        if stream is None:
            raise VideoError(f"{path}: {_content_of(container)}; pass a file with a video")
        if stream.codec_context is None:
            raise VideoError(f"{path}: FFmpeg has no decoder for its video; re-encode it as H.264")
        check_size(path, stream.codec_context.width, stream.codec_context.height, limits)
        # The decoder also refuses larger frames before it allocates one.
        stream.codec_context.options = {"max_pixels": str(limits.max_pixels)}
        yield container, stream


def check_size(path: str, width: int, height: int, limits: Limits) -> None:
    """Raise VideoError when frames exceed limits.max_pixels."""
    if width * height > limits.max_pixels:
        raise VideoError(
            f"{path}: frames of {width}x{height} have more than {limits.max_pixels} pixels; "
            "scale it down or raise Limits.max_pixels"
        )


def check_file(path: str) -> None:
    """Raise VideoError unless `path` is a readable, regular file that is not empty."""
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


def _best_stream(container: InputContainer) -> VideoStream | None:
    """FFmpeg's best video stream (av_find_best_stream), or the best one that is no cover."""
    best = container.streams.best("video")
    if not isinstance(best, VideoStream):
        return None
    if not _is_cover(best):
        return best
    # FFmpeg may choose a cover; then the default one of the others, or that of the highest rate.
    default = av.stream.Disposition.default
    films = [stream for stream in container.streams.video if not _is_cover(stream)]
    return max(films, key=lambda s: (s.disposition & default, s.bit_rate or 0), default=None)


def _content_of(container: InputContainer) -> str:
    """Describe a container without a video."""
    kinds = {stream.type for stream in container.streams}
    if "video" in kinds:
        with_audio = "audio and a cover picture" if "audio" in kinds else "a cover picture"
        return f"it holds {with_audio}, no video"
    return f"it holds {', '.join(sorted(kinds)) or 'no streams'}, no video stream"


# Files that are often mistaken for videos, by their first bytes.
_SIGNATURES = (
    (b"\x89PNG\r\n", "an image (PNG)"), (b"\xff\xd8\xff", "an image (JPEG)"),
    (b"BM", "an image (BMP)"), (b"II*\0", "an image (TIFF)"), (b"MM\0*", "an image (TIFF)"),
    (b"\0\0\1\0", "an image (ICO)"), (b"8BPS", "an image (PSD)"),
    (b"ID3", "an audio file (MP3)"), (b"fLaC", "an audio file (FLAC)"),
    (b"#!AMR", "an audio file (AMR)"), (b"MThd", "an audio file (MIDI)"),
    (b"FORM", "an audio file (AIFF)"), (b"#EXTM3U", "a playlist"), (b"ffconcat", "a playlist"),
    (b"%PDF", "a PDF document"), (b"PK\3\4", "a ZIP archive"), (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf", "a 7z archive"), (b"Rar!", "a RAR archive"),
)  # fmt: skip
_RIFF = {b"WEBP": "an image (WebP)", b"WAVE": "an audio file (WAV)"}
# Number of first bytes to look at.
_HEAD = 4096


def _why_not_opened(path: str, error: Exception) -> str:
    """Name what people pass by mistake; FFmpeg's own errors are generic."""
    with open(path, "rb") as file:
        head = file.read(_HEAD)
        file.seek(0)
        boxes = _top_level_boxes(file)
    if "ftyp" in boxes and "moov" not in boxes:
        return "an MP4 without its index (moov): truncated or never finished; get it again"
    if kind := _kind(head):
        return f"{kind}, not a video; pass a video file"
    reason = "a text file" if _is_text(head) else getattr(error, "strerror", None) or str(error)
    return f"not a video that can be read ({reason}); re-encode it or check what it is"


def _kind(head: bytes) -> str | None:
    """The kind of a file by its first bytes; None if they do not show it."""
    if head[:4] == b"RIFF" and head[8:12] in _RIFF:
        return _RIFF[head[8:12]]
    for signature, kind in _SIGNATURES:
        if head.startswith(signature):
            return kind
    if head[:1] == b"\xff" and len(head) > 1 and head[1] & 0xE6 == 0xE2:
        return "an audio file (MP3)"
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "a web page (HTML)"
    return None


def _is_text(head: bytes) -> bool:
    # The head may end inside a character and then holds at most 3 bytes of it.
    text = head.decode("utf-8", errors="ignore")
    whole = len(text.encode()) >= len(head) - 3
    return whole and all(c.isprintable() or c.isspace() for c in text)


def _top_level_boxes(file: BinaryIO) -> list[str]:
    """Names of an ISO base media file's outer boxes that are complete."""
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


def _is_cover(stream: VideoStream) -> bool:
    """Whether a stream is a song's cover picture, which FFmpeg counts as a video stream."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)
