"""Small copies of a manifest's videos, from which training reads frames at a fraction of the cost.

A span of a long file is decoded from a keyframe that may lie many seconds before each sampled
frame, at full size. A copy holds the span alone, at the training's resolution, with a keyframe
every second. It keeps every frame and the frame rate, so sampling chooses the same frames with the
same times. Their pixels differ slightly: FFmpeg's Lanczos filter stands in for Pillow's, and the
copy is compressed. Chroma is not subsampled (4:4:4): at this size, that would change pixels more
than compression does.

Layout of the folder::

    manifest.jsonl            the same examples about the copies
    quarantine.jsonl          the videos that could not be read
    videos/000000.mp4         the copies, in the order of the videos in the manifest
    run.json, shards/         what was done, for a later run to continue
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from v2l_fast.data.manifest import (
    Example,
    VideoExamples,
    group_by_video,
    load_manifest,
    video_key,
    write_manifest,
)
from v2l_fast.data.readers import Failure, read_ahead
from v2l_fast.data.shards import Line, Progress, Shards
from v2l_fast.data.teach import REQUIRED
from v2l_fast.errors import ConfigError, VideoError
from v2l_fast.files import json_sha256, write_errors, write_jsonl
from v2l_fast.outputs import check_folder
from v2l_fast.video.info import Limits
from v2l_fast.video.preprocess import MAX_EDGE, shrunk_size
from v2l_fast.video.pyav import PyAVSource
from v2l_fast.video.reader import frames_of_span
from v2l_fast.video.writer import write_video

# Incremented when the copies of the same videos would differ.
VERSION = 1
# Bytes of the frames in memory at a time, and the most frames that a piece of a video has.
_PIECE_BYTES, _PIECE = 1 << 28, 1024
# Videos of a shard; an interruption costs no copy that is complete.
_SHARD = 32


@dataclass(frozen=True)
class TranscodeSettings:
    """How videos are copied.

    Attributes:
        longest_edge: of the copies in pixels; smaller videos keep their size.
        keyframe_seconds: largest distance of two keyframes.
        seconds: time limit of one video; beyond it the file counts as unreadable.
        threads: videos copied at the same time; each may use several cores to decode.

    Raises:
        ConfigError: a value is out of range.
    """

    longest_edge: int = 384
    keyframe_seconds: float = 1.0
    seconds: float = 600.0
    threads: int = 2

    def __post_init__(self) -> None:
        if not 2 <= self.longest_edge <= MAX_EDGE:
            raise ConfigError(
                f"longest_edge must be at least 2 and at most {MAX_EDGE}, got {self.longest_edge}"
            )
        for name in ("keyframe_seconds", "seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be a positive number, got {getattr(self, name)}")
        if self.threads < 1:
            raise ConfigError(f"threads must be at least 1, got {self.threads}")


@dataclass(frozen=True)
class TranscodeResult:
    """The manifest of the copies, their number and bytes, and the videos left out."""

    manifest: Path
    videos: int
    bytes: int
    failures: list[Failure]


def transcode(
    manifest: str | os.PathLike,
    out: str | os.PathLike,
    settings: TranscodeSettings | None = None,
    root: str | os.PathLike | None = None,
    progress: Progress = lambda done, total: None,
) -> TranscodeResult:
    """Copy every video or span of a manifest; continues an interrupted run.

    The new manifest has the same examples in the same order, without those of videos that cannot be
    read. `metadata.original` names the file and span of each, and `metadata.video_id` keeps copies
    of one video in one split.

    Args:
        out: folder of the copies and their manifest.
        root: folder that relative video paths start from; the manifest's if omitted.
        progress: called with the number of videos done and their total.

    Raises:
        ManifestError: the manifest cannot be used.
        ShardError: `out` contains a run with other settings or videos.
        WriteError: a file cannot be written, or would replace one of another program.
    """
    settings = settings or TranscodeSettings()
    names = ("manifest.jsonl", "quarantine.jsonl")
    # An earlier run's folder is continued; files of other programs are not overwritten.
    check_folder(out, names, [manifest], force=(Path(out) / "run.json").is_file())
    videos = group_by_video(load_manifest(manifest, root, required=REQUIRED))
    fingerprint = {
        "transcode": VERSION,
        "longest_edge": settings.longest_edge,
        "keyframe_seconds": settings.keyframe_seconds,
        "manifest": json_sha256(*([v.examples[0].video_path, v.span] for v in videos)),
    }
    shards = Shards.open(out, fingerprint, len(videos), _SHARD)

    def copy(number: int) -> Line:
        target = _target(shards.folder, number)
        try:
            if not target.exists():
                write_copy(videos[number], target, settings)
        except VideoError as error:
            return {"video": number, "failure": str(error)}
        return {"video": number}

    def work(numbers: Sequence[int]) -> list[Line]:
        return list(read_ahead(copy, numbers, settings.threads))

    folder = shards.folder / "videos"
    with write_errors(folder):
        folder.mkdir(exist_ok=True)
    shards.run(work, progress)
    rows: list[dict[str, Any]] = []
    failures, copied = [], 0
    for line in shards.lines():
        video, target = videos[line["video"]], _target(shards.folder, line["video"])
        if "failure" in line:
            failures.append(Failure(video.name, line["failure"]))
        else:
            copied += target.stat().st_size
            path = target.relative_to(shards.folder).as_posix()
            rows += (_row(example, path) for example in video.examples)
    write_manifest(shards.folder / names[0], rows)
    write_jsonl(shards.folder / names[1], map(asdict, failures))
    done = len(videos) - len(failures)
    return TranscodeResult(shards.folder / names[0], done, copied, failures)


def write_copy(video: VideoExamples, target: Path, settings: TranscodeSettings) -> None:
    """Write one video's copy, H.264 in MP4 without sound, atomically.

    Raises:
        VideoError: the video cannot be read, or not in time.
        WriteError: the copy cannot be written.
    """
    try:
        source = PyAVSource(video.path, Limits(max_seconds=settings.seconds))
        info = source.info
        span = frames_of_span(video.path, info.num_frames, info.fps, video.span)
        size = shrunk_size(info.height, info.width, settings.longest_edge)
        if size != (info.height, info.width):
            source.scaled_to = size
        pieces = _pieces(source, *span, size)
        first = next(pieces, None)
        if first is None:
            raise VideoError(f"{video.path}: no frame of {video.name} can be decoded")
    except OSError as error:
        raise VideoError(f"{video.path}: cannot be read ({error.strerror or error})") from None
    # Rates such as 30000/1001 are exact, so that a copy's frames have the same times.
    rate = Fraction(info.fps).limit_denominator(100_000)
    write_video(
        target,
        chain(first, chain.from_iterable(pieces)),
        size,
        rate,
        "yuv444p",
        {
            "tune": "fastdecode",
            "g": str(max(1, round(info.fps * settings.keyframe_seconds))),
            # The matrix that swscale converts RGB with.
            "colorspace": "smpte170m",
            "color_range": "tv",
        },
        {"movflags": "+faststart"},
    )


def _pieces(
    source: PyAVSource, first: int, stop: int, size: tuple[int, int]
) -> Iterator[np.ndarray]:
    """Frames first..stop-1 in order, uint8 [n, H, W, 3] each; ends where the file does."""
    step = max(1, min(_PIECE, _PIECE_BYTES // (3 * size[0] * size[1])))
    for start in range(first, stop, step):
        decoded = source.read(np.arange(start, min(start + step, stop)))
        if len(decoded.frames):
            yield decoded.frames.numpy()
        if decoded.available is not None:
            return


def _target(folder: Path, number: int) -> Path:
    return folder / "videos" / f"{number:06d}.mp4"


def _row(example: Example, path: str) -> dict[str, Any]:
    """The manifest line of an example about a copy."""
    metadata = {k: v for k, v in example.metadata.items() if k != "span"}
    original = {"video_path": example.video_path, "span": example.metadata.get("span")}
    metadata |= {"video_id": video_key(example), "original": original}
    return example.row(video_path=path, metadata=metadata)
