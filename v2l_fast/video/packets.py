"""Count, rate and times of a stream's frames, from all of its packets and without decoding.

Headers state 0 frames for WebM and too many for a truncated MP4, and the times of a stream may
restart, jump, or be missing. Responsible for one steady clock in spite of all that, and for
locating each frame's group of pictures. `pyav` decodes.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import av
import numpy as np
from av.container import InputContainer
from av.format import Flags
from av.video.stream import VideoStream

from v2l_fast.errors import VideoError
from v2l_fast.video.info import Deadline

log = logging.getLogger(__name__)

# In these a packet is one shown frame and has its presentation time, so times locate frames.
_SEEKABLE_CODECS = {"h264", "hevc", "vp9", "av1", "mjpeg"}
_SEEKABLE_FORMATS = {"mov", "matroska"}
# Frames that decode later than they are shown (H.264 allows 16).
_REORDERED = 16
# Seconds, and median intervals, from which a step forward is not a pause but another clock: in
# formats whose times may jump (FFmpeg's own limit for them is 10 s), and in all others.
_JUMP = {True: (10.0, 10), False: (3600.0, 1000)}
# Frames/s of a raw stream whose headers state no rate (FFmpeg's own assumption).
_RAW_RATE = 25.0


@dataclass(frozen=True)
class Timeline:
    """Positions of frames in a stream whose presentation times locate them.

    A group is what is shown from one keyframe to the next. A keyframe's leading pictures (decoded
    after it, shown before it) belong to the previous group.

    frames, keyframes: presentation times (int64, in the stream's time base, increasing).
    last: for each group, the presentation time of its last packet in the file.
    """

    frames: np.ndarray
    keyframes: np.ndarray
    last: np.ndarray

    @property
    def num_groups(self) -> int:
        """Groups of pictures in the stream."""
        return len(self.keyframes)

    def group_of(self, indices: np.ndarray) -> np.ndarray:
        """The group of each frame."""
        return np.searchsorted(self.keyframes, self.frames[indices], side="right") - 1

    def index_of(self, time: int | None) -> int | None:
        """The frame shown at a presentation time."""
        if time is None:
            return None
        index = int(self.frames.searchsorted(time))
        return index if index < len(self.frames) and self.frames[index] == time else None

    def frames_of(self, group: int) -> tuple[int, int]:
        """[first, stop) of a group's frames."""
        first = int(self.frames.searchsorted(self.keyframes[group]))
        if group + 1 == self.num_groups:
            return first, len(self.frames)
        return first, int(self.frames.searchsorted(self.keyframes[group + 1]))

    def distance(self, group: int, other: int) -> int:
        """Frames from the start of `group` (at most `num_groups`) to that of `other`."""
        if group == self.num_groups:
            return -1
        return self.frames_of(other)[0] - self.frames_of(group)[0]


@dataclass(frozen=True)
class Packets:
    """A stream as its packets describe it.

    count: packets that are frames and are shown. fps: frames/s. codec: FFmpeg's name.
    seconds: float64 [count], times at which frames are shown, counted from frame 0, nondecreasing;
    NaN where the file has none.
    plain: whether every packet of the only video stream is a frame that is shown.
    timeline: None if times do not locate frames.
    """

    count: int
    fps: float
    codec: str
    seconds: np.ndarray
    plain: bool
    timeline: Timeline | None

    def to_bytes(self) -> bytes:
        """The table as :meth:`from_bytes` reads it, for another process that reads the file."""
        fields = {"count": self.count, "fps": self.fps, "codec": self.codec, "plain": self.plain}
        timeline = {} if self.timeline is None else vars(self.timeline)
        arrays: dict[str, Any] = {
            "fields": np.array(json.dumps(fields)), "seconds": self.seconds, **timeline
        }  # fmt: skip
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Packets:
        """Read what :meth:`to_bytes` wrote; nothing in it is executed."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            fields = json.loads(str(arrays["fields"]))
            names = ("frames", "keyframes", "last")
            timeline = Timeline(*(arrays[n] for n in names)) if "frames" in arrays else None
            return cls(**fields, seconds=arrays["seconds"], timeline=timeline)


def read_packets(
    path: str, container: InputContainer, stream: VideoStream, deadline: Deadline
) -> Packets:
    """Walk over all packets of `stream`.

    Raises VideoError when there is none, when they are encrypted, or when the deadline passes.
    """
    plain = len(container.streams.video) == 1
    # The name of the format; AV1's decoder has another name.
    codec, claimed = stream.codec_context.codec.canonical_name, stream.frames
    exact = codec in _SEEKABLE_CODECS and not _SEEKABLE_FORMATS.isdisjoint(
        container.format.name.split(",")
    )
    raw = bool(container.format.flags & cast(int, Flags.no_timestamps.value))
    jumping = bool(container.format.flags & cast(int, Flags.ts_discont.value))
    shown_at: list[int | None] = []
    decoded_at: list[int | None] = []
    keys: list[bool] = []
    duration = 0
    try:
        for packet in container.demux(stream):
            deadline.check()
            if packet.size == 0:
                continue
            if packet.is_discard or _is_hidden(codec, packet):
                plain = False
                continue
            if not shown_at and packet.has_sidedata("encryption_info"):
                raise VideoError(f"{path}: encrypted (DRM); pass a file without encryption")
            shown_at.append(packet.pts)
            decoded_at.append(packet.dts)
            keys.append(packet.is_keyframe)
            exact &= packet.pts is not None and not packet.is_corrupt
            duration = packet.duration or duration
    except MemoryError:
        raise
    except av.FFmpegError as error:
        deadline.check()
        exact = False
        log.warning("%s: cut short after %d packets: %s", path, len(shown_at), error)
    count = len(shown_at)
    if count == 0:
        raise VideoError(f"{path}: its video stream is empty; the file may be truncated")
    if claimed > count:
        log.warning(
            "%s: its header claims %d frames, the file holds %d; it may be truncated",
            path, claimed, count,
        )  # fmt: skip
    if raw:
        fps = _raw_rate(path, stream)
        return Packets(count, fps, codec, np.arange(count) / fps, plain, None)
    declared = float(stream.average_rate or stream.guessed_rate or 0)
    time_base = stream.time_base or Fraction(0)
    times, restarts = _steady(shown_at, decoded_at, keys, float(time_base), jumping)
    span = 0.0
    if times is not None and time_base:
        last = duration or (times[-1] - times[0]) / max(count - 1, 1)
        span = float((times[-1] - times[0] + last) * time_base)
        seconds = (times - times[0]).astype(np.float64) * float(time_base)
    else:
        seconds = np.full(count, np.nan)
    fps = _frame_rate(count, declared, span)
    timeline = None
    if exact and not restarts and True in keys:
        timeline = _timeline(np.array(shown_at, np.int64), np.array(keys))
    return Packets(count, fps, codec, seconds, plain, timeline)


def _timeline(shown: np.ndarray, keys: np.ndarray) -> Timeline | None:
    """The timeline of presentation times int64 [N] in the file's order; keys: bool [N]."""
    frames, keyframes = np.sort(shown), shown[keys]
    if not (np.diff(frames) > 0).all() or not (np.diff(keyframes) > 0).all():
        return None
    # A stream that does not begin with a keyframe has frames that are never shown.
    if keyframes[0] != frames[0]:
        return None
    group = np.searchsorted(keyframes, shown, side="right") - 1
    last = np.zeros(len(keyframes), np.int64)
    last[group] = shown  # Among equal indices the last assignment remains.
    return Timeline(frames, keyframes, last)


def _steady(
    shown: Sequence[int | None],
    decoded: Sequence[int | None],
    keys: Sequence[bool],
    time_base: float,
    jumping: bool,
) -> tuple[np.ndarray | None, bool]:
    """Times of the frames in presentation order on one clock, and whether the file's restarts.

    shown, decoded: times of packets in the file's order. Where the file's clock restarts or jumps,
    the result continues one median interval after the last packet. The result is sorted: some
    formats (AVI, ASF) store decoding times only, and frame i is then shown at the i-th of them.
    None if no packet has a time.
    """
    known = [pts if pts is not None else dts for pts, dts in zip(shown, decoded, strict=True)]
    present = np.array([time for time in known if time is not None], np.int64)
    if not len(present):
        return None, False
    steps = np.diff(np.sort(present))
    steps = steps[steps > 0]
    interval = int(np.median(steps)) if len(steps) else 0
    seconds, intervals = _JUMP[jumping]
    # A time base of zero does not give seconds.
    jump = max(seconds / time_base if time_base else 0, intervals * interval, 1)
    times = np.empty(len(known), np.int64)
    restarts = False
    offset = 0
    newest: int | None = None
    previous: int | None = None
    for i, (time, dts, key) in enumerate(zip(known, decoded, keys, strict=True)):
        if time is None:
            # A packet without a time is shown after the one before it.
            times[i] = times[i - 1] + interval if i else present[0]
            continue
        if newest is not None:
            behind = key if dts is None or previous is None else dts < previous
            # Only its leading pictures follow a keyframe and are shown earlier.
            falls = behind and time < newest + (1 if key else -(_REORDERED + 1) * interval)
            if falls or time - newest > jump:
                restarts |= falls
                offset += newest + interval - (time if key or dts is None else min(time, dts))
                newest = None
        newest = time if newest is None else max(newest, time)
        previous = dts if dts is not None else previous
        times[i] = time + offset
    return np.sort(times), restarts


def _raw_rate(path: str, stream: VideoStream) -> float:
    """Frames/s of a stream without a container."""
    rate = stream.codec_context.framerate or 0
    if 0 < rate < 1000:
        return float(stream.guessed_rate or rate)
    log.warning(
        "%s: a raw stream that states no frame rate, %g frames/s are assumed; "
        "put it into a container with its rate (ffmpeg -framerate N -i IN -c copy OUT.mp4)",
        path, _RAW_RATE,
    )  # fmt: skip
    return _RAW_RATE


def _frame_rate(count: int, declared: float, span: float) -> float:
    """Frames/s: the header's average rate, unless the packets' own times contradict it.

    declared: frames/s, 0 if the header has none. span: seconds from the first frame's start to the
    last one's end, 0 if the packets have no times.
    """
    measured = count / span if span > 0 else 0.0
    # A truncated file can lack a few frames that are shown before its last ones.
    tolerance = 0.1 * span + _REORDERED / declared if declared > 0 else 0.0
    if declared > 0 and (not measured or abs(count / declared - span) <= tolerance):
        return declared
    # A single picture without any timing is shown for a second.
    return measured or 1.0


def _is_hidden(codec: str, packet: av.Packet) -> bool:
    """Whether a packet is one of VP8's reference frames that are never shown (RFC 6386, 9.1)."""
    return codec == "vp8" and not bytes(packet)[0] & 0x10
