"""One video file read through PyAV (FFmpeg): counted, described, decoded by frame index.

Responsible for giving exactly the frames asked for, or a VideoError that names the file. Opening
it safely is `opening`; which indices are wanted and what becomes of the pixels is the caller's.

Pixels are those of `frame.to_ndarray(format="rgb24")`, the released checkpoints' reader: swscale
follows the stream's color tags and assumes BT.601 where there are none.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import av
import numpy as np
import torch
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideDataType
from av.video.stream import VideoStream

from v2l_fast.errors import VideoError
from v2l_fast.video.info import VideoInfo
from v2l_fast.video.limits import Deadline, Limits
from v2l_fast.video.opening import check_file, check_size, open_stream
from v2l_fast.video.orientation import Orientation

log = logging.getLogger(__name__)

# Here a packet is one shown frame and carries its presentation time, so times locate frames.
_SEEKABLE_CODECS = {"h264", "hevc", "vp9", "av1", "mjpeg"}
_SEEKABLE_FORMATS = {"mov", "matroska"}
# Skipping fewer frames than this costs more (decoder restart) than decoding them.
_SEEK_GAIN = 24
# Frames that decode later than they are shown (H.264 allows 16).
_REORDERED = 16

# Matrix coefficients and range as ISO/IEC 23091-2 numbers and FFmpeg names them.
_COLOR_SPACES = {
    0: "rgb", 1: "bt709", 2: "unspecified", 4: "fcc", 5: "bt470bg", 6: "smpte170m",
    7: "smpte240m", 8: "ycgco", 9: "bt2020nc", 10: "bt2020c", 14: "ictcp",
}  # fmt: skip
_COLOR_RANGES = {0: "unspecified", 1: "tv", 2: "pc"}


class _NotSeekable(Exception):
    """Seeking did not lead to the frame asked for; decoding from the start will."""


@dataclass(frozen=True)
class _Timeline:
    """Presentation times (int64, in the stream's time base, sorted) of frames and keyframes."""

    frames: np.ndarray
    keyframes: np.ndarray
    time_base: Fraction  # seconds of a tick

    def seconds(self, indices: np.ndarray) -> tuple[float, ...]:
        """When each frame is shown, counted from the first."""
        ticks = (self.frames[indices] - self.frames[0]).tolist()
        return tuple(float(tick * self.time_base) for tick in ticks)

    def key_of(self, indices: np.ndarray) -> np.ndarray:
        """Time of the last keyframe not later than each frame."""
        return self.keyframes[
            np.searchsorted(self.keyframes, self.frames[indices], side="right") - 1
        ]

    def worth_a_jump(self, indices: np.ndarray) -> np.ndarray:
        """bool [F]: to reach that index, jump to its keyframe instead of decoding on."""
        key_index = np.searchsorted(self.frames, self.key_of(indices))
        previous = np.concatenate(([-1], indices[:-1]))
        return key_index - previous > _SEEK_GAIN


@dataclass(frozen=True)
class _Packets:
    """What demuxing the whole stream tells without decoding it."""

    count: int
    fps: float
    codec: str
    plain: bool  # every packet of the only video stream is a frame that is shown
    timeline: _Timeline | None  # None when times do not locate frames


@dataclass(frozen=True)
class Decoded:
    """frames: uint8 [F, H, W, 3] for the indices below `available`, in their order.

    times: seconds of each frame on the stream's own clock, counted from its first frame; NaN
    where the file does not say.
    available: the number of frames the file really has when its end came before the last index
    asked for, else None.
    """

    frames: torch.Tensor
    times: tuple[float, ...]
    available: int | None


class PyAVSource:
    """A file under `limits`; every method may raise VideoError.

    Opening is lazy and each pass over the file opens it anew, since not every format can rewind.
    """

    def __init__(self, path: str | os.PathLike, limits: Limits):
        self.path = os.fspath(path)
        self.limits = limits
        self.deadline = Deadline(self.path, limits.max_seconds)
        self._end = 0
        check_file(self.path)

    @cached_property
    def info(self) -> VideoInfo:
        """Counts all packets and decodes the first frame."""
        packets, frame = self._packets, self._first_frame
        orientation = _orientation(frame)
        height, width = (
            (frame.width, frame.height) if orientation.transpose else (frame.height, frame.width)
        )
        duration = packets.count / packets.fps
        if duration > self.limits.max_duration:
            raise VideoError(
                f"{self.path}: {duration:.0f} s long, more than {self.limits.max_duration:g} s; "
                "cut it or raise Limits.max_duration"
            )
        return VideoInfo(
            path=self.path,
            num_frames=packets.count,
            fps=packets.fps,
            duration=duration,
            width=width,
            height=height,
            rotation=orientation.rotation,
            mirrored=orientation.mirrored,
            codec=packets.codec,
            color_space=_COLOR_SPACES.get(frame.colorspace, str(frame.colorspace)),
            color_range=_COLOR_RANGES.get(frame.color_range, str(frame.color_range)),
        )

    @property
    def orientation(self) -> Orientation:
        """How the first frame must be turned."""
        return _orientation(self._first_frame)

    def read(
        self,
        indices: np.ndarray,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Decoded:
        """Decode frames `indices` (int64, sorted, unique, >= 0), upright.

        transform: applied to each frame or several, uint8 [..., H, W, 3] -> uint8 [..., H', W', 3],
        before they are kept.
        Frames far apart are reached by seeking, which gives the same pixels as decoding from the
        start (the fallback wherever a file does not lend itself to it).
        """
        self.check_count(len(indices))
        timeline = self._seekable(indices)
        if timeline is not None:
            try:
                return self._collect(indices, self._seek_through(timeline, indices), transform)
            except _NotSeekable:
                log.info("%s: seeking is not exact here, decoding from the start", self.path)
        return self._collect(indices, self._decode_through(indices), transform)

    def _collect(
        self,
        indices: np.ndarray,
        found: Iterator[av.VideoFrame],
        transform: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> Decoded:
        # Copied by NumPy, in this thread: PyTorch's threads wait for more work actively, beside the
        # decoder's, and a frame then takes several times as long.
        kept = torch.empty(0, 0, 0, 3, dtype=torch.uint8)
        times: list[float] = []
        size: tuple[int, ...] = ()
        for position, frame in enumerate(found):
            try:
                coded = frame.to_ndarray(format="rgb24")
            except (av.FFmpegError, ValueError) as error:
                raise VideoError(
                    f"{self.path}: its pixels ({frame.format.name}) cannot be turned into RGB; "
                    "re-encode it"
                ) from error
            upright = _orientation(frame).apply(coded)
            if position and size != upright.shape:
                raise VideoError(
                    f"{self.path}: the frame size changes from {size[1]}x{size[0]} to "
                    f"{upright.shape[1]}x{upright.shape[0]} at frame {indices[position]}; "
                    "re-encode it"
                )
            size = upright.shape
            image = upright
            if transform is not None:
                image = transform(torch.from_numpy(np.ascontiguousarray(upright))).numpy()
            if position == 0:
                self.check_memory(len(indices), image.shape)
                kept = torch.empty(len(indices), *image.shape, dtype=torch.uint8)
            kept.numpy()[position] = image
            times.append(self._seconds(frame))
        available = None if len(times) == len(indices) else self._end
        if available == 0:
            raise self.nothing_decodes()
        return Decoded(kept[: len(times)], tuple(times), available)

    def check_count(self, num_frames: int) -> None:
        """Raise VideoError when `num_frames` pass Limits.max_frames."""
        if num_frames > self.limits.max_frames:
            raise VideoError(
                f"{self.path}: {num_frames} frames asked for, more than "
                f"{self.limits.max_frames}; ask for fewer or raise Limits.max_frames"
            )

    def nothing_decodes(self) -> VideoError:
        """The error for a stream of which not a single frame can be had."""
        return VideoError(
            f"{self.path}: not one frame can be decoded; the file is damaged, re-encode it"
        )

    def check_memory(self, num_frames: int, shape: Sequence[int]) -> None:
        """Raise VideoError when `num_frames` of `shape` (H, W, 3) pass Limits.max_bytes."""
        size = num_frames * math.prod(shape)
        if size > self.limits.max_bytes:
            raise VideoError(
                f"{self.path}: {num_frames} frames of {shape[1]}x{shape[0]} take {size} bytes, "
                f"more than {self.limits.max_bytes}; pass longest_edge, ask for fewer frames or "
                "raise Limits.max_bytes"
            )

    def _open(self) -> AbstractContextManager[tuple[InputContainer, VideoStream]]:
        return open_stream(self.path, self.limits, self.deadline)

    # --- looking at it once --------------------------------------------------------------------

    @cached_property
    def _packets(self) -> _Packets:
        """Demux everything: headers say 0 for WebM and too much for a truncated MP4."""
        count = 0
        times: list[int | None] = []
        keyframes: list[int | None] = []
        duration = 0
        with self._open() as (container, stream):
            plain = len(container.streams.video) == 1
            codec, claimed = stream.codec_context.name, stream.frames
            declared = float(stream.average_rate or stream.guessed_rate or 0)
            exact = codec in _SEEKABLE_CODECS and not _SEEKABLE_FORMATS.isdisjoint(
                container.format.name.split(",")
            )
            time_base = stream.time_base
            try:
                for packet in container.demux(stream):
                    self.deadline.check()
                    if packet.size == 0:
                        continue
                    if packet.is_discard or _is_hidden(codec, packet):
                        plain = False
                        continue
                    count += 1
                    times.append(packet.pts)
                    exact &= packet.pts is not None and not packet.is_corrupt
                    if packet.is_keyframe:
                        keyframes.append(packet.pts)
                    duration = packet.duration or duration
            except MemoryError:
                raise
            except av.FFmpegError as error:
                self.deadline.check()
                exact = False
                log.warning("%s: cut short after %d packets: %s", self.path, count, error)
        if count == 0:
            raise VideoError(f"{self.path}: its video stream is empty; the file may be truncated")
        if claimed > count:
            log.warning(
                "%s: its header claims %d frames, the file holds %d; it may be truncated",
                self.path, claimed, count,
            )  # fmt: skip
        known = np.sort(np.array([t for t in times if t is not None], dtype=np.int64))
        span = 0.0
        if known.size and time_base:
            last = duration or (known[-1] - known[0]) / max(known.size - 1, 1)
            span = float((known[-1] - known[0] + last) * time_base)
        fps = _frame_rate(count, declared, span)
        exact = exact and known.size == count and bool((np.diff(known) > 0).all())
        if not exact or not keyframes:
            return _Packets(count, fps, codec, plain, None)
        keys = np.sort(np.array(keyframes, dtype=np.int64))
        return _Packets(count, fps, codec, plain, _Timeline(known, keys, time_base))

    @property
    def _timeline(self) -> _Timeline | None:
        """The stream's timeline if its index of a frame is that frame's place in it."""
        line = self._packets.timeline
        # A stream that does not begin with a frame it can show has its indices shifted.
        if line is None or not line.keyframes[0] == line.frames[0] == self._first_frame.pts:
            return None
        return line

    @cached_property
    def _first_frame(self) -> av.VideoFrame:
        for frame in self._frames(threads=False):
            return frame
        raise self.nothing_decodes()

    def _seconds(self, frame: av.VideoFrame) -> float:
        first = self._first_frame
        if frame.pts is None or first.pts is None or not frame.time_base:
            return float("nan")
        return float((frame.pts - first.pts) * frame.time_base)

    # --- decoding ------------------------------------------------------------------------------

    def _frames(self, threads: bool = True) -> Iterator[av.VideoFrame]:
        """All frames that decode, in presentation order; `_end` is their number afterwards."""
        count = 0
        with self._open() as (container, stream):
            if threads:
                stream.thread_type = "AUTO"
            for frame in self._decoded(container, stream):
                yield frame
                count += 1
        self._end = count

    def _decoded(self, container, stream) -> Iterator[av.VideoFrame]:
        """Frames from where `container` stands; a packet that does not decode is passed over.

        Raises MemoryError where FFmpeg runs out of memory: that is no fault of the file's.
        """
        damaged = 0
        packets = container.demux(stream)
        while True:
            self.deadline.check()
            try:
                packet = next(packets, None)
            except MemoryError:
                raise
            except av.FFmpegError:
                self.deadline.check()
                # The rest of the file cannot be read; what the decoder still holds can.
                packet = None
            try:
                frames = stream.codec_context.decode(None) if packet is None else packet.decode()
            except av.EOFError:
                frames = []
            except MemoryError:
                raise
            except av.FFmpegError:
                damaged += 1
                frames = []
            for frame in frames:
                check_size(self.path, frame.width, frame.height, self.limits)
                yield frame
            if packet is None or packet.size == 0:
                break
        if damaged:
            log.warning("%s: %d damaged packets were passed over", self.path, damaged)

    def _decode_through(self, indices: np.ndarray) -> Iterator[av.VideoFrame]:
        """The frame of each index, decoding from the start up to the last one."""
        wanted = set(indices.tolist())
        for i, frame in enumerate(self._frames()):
            if i in wanted:
                yield frame
            if i == indices[-1]:
                return

    def _seekable(self, indices: np.ndarray) -> _Timeline | None:
        """The stream's timeline where seeking to some of `indices` is exact and pays."""
        if len(indices) == 0 or indices[-1] >= self._packets.count:
            return None
        line = self._timeline
        return line if line is not None and line.worth_a_jump(indices).any() else None

    def _seek_through(self, timeline: _Timeline, indices: np.ndarray) -> Iterator[av.VideoFrame]:
        """As `_decode_through`, jumping over groups of pictures that hold nothing wanted.

        Frames are identified by presentation time. After a jump, decoding starts at a keyframe
        not later than the wanted frame, on which that frame does not look back (leading pictures,
        which do, come before their keyframe in time and belong to the previous one here).
        Raises _NotSeekable when the file does not behave so.
        """
        targets = timeline.frames[indices].tolist()
        keys = timeline.key_of(indices).tolist()
        jumps = timeline.worth_a_jump(indices).tolist()
        with self._open() as (container, stream):
            stream.thread_type = "AUTO"
            frames = self._decoded(container, stream)
            for target, key, jump in zip(targets, keys, jumps, strict=True):
                if jump:
                    self._jump(container, stream, key)
                    frames = self._decoded(container, stream)
                frame = next((f for f in frames if f.pts is None or f.pts >= target), None)
                if frame is None or frame.pts != target or frame.is_corrupt:
                    raise _NotSeekable
                yield frame

    def _jump(self, container, stream, key: int) -> None:
        """Place `container` at the keyframe shown at `key`, or at an earlier one."""
        try:
            container.seek(key, stream=stream, backward=True)
            landed = next(container.demux(stream), None)
            if landed is None or not landed.is_keyframe or landed.pts is None or landed.pts > key:
                raise _NotSeekable
            # Looking at the packet consumed it.
            container.seek(key, stream=stream, backward=True)
        except av.FFmpegError as error:
            raise _NotSeekable from error


def _is_hidden(codec: str, packet) -> bool:
    """VP8 stores its never-shown reference frames as packets of their own (RFC 6386, 9.1)."""
    return codec == "vp8" and not bytes(packet)[0] & 0x10


def _orientation(frame: av.VideoFrame) -> Orientation:
    matrices = (data for data in frame.side_data if data.type is SideDataType.DISPLAYMATRIX)
    matrix = next(matrices, None)
    return Orientation() if matrix is None else Orientation.from_display_matrix(bytes(matrix))


def _frame_rate(count: int, declared: float, span: float) -> float:
    """Frames/s: the header's average rate, unless the packets' own times contradict it.

    declared: frames/s, 0 when the header has none. span: seconds from the first frame's start to
    the last one's end, 0 when the packets carry no times.
    """
    measured = count / span if span > 0 else 0.0
    # A cut file can lack frames that come before its last ones in time, a handful at most.
    tolerance = 0.1 * span + _REORDERED / declared if declared > 0 else 0.0
    if declared > 0 and (not measured or abs(count / declared - span) <= tolerance):
        return declared
    # A lone picture without any timing is shown for a second.
    return measured or 1.0
