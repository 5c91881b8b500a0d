"""Describes a video file and decodes its frames by index through PyAV (FFmpeg).

Responsible for returning exactly the requested frames, or a VideoError that names the file.
`container` opens the file safely, `packets` interprets its packets; the caller chooses the indices
and what to do with the pixels.

One rule defines frame i, independently of the machine, the number of its cores and the other frames
of the request. Every decoder runs in one thread, because FFmpeg's own threads lose and conceal
damaged frames differently for different numbers of threads; several groups of pictures are decoded
at the same time instead.

- Where presentation times locate frames (H.264, HEVC, VP9, AV1 and MJPEG in MP4, MOV, Matroska and
  WebM, if the file begins with a keyframe), frame i is the i-th of the file's packets in
  presentation order, decoded from the keyframe that begins its group of pictures. A group that
  shows any sign of damage is decoded again, alone, by a new decoder. A frame that does not decode
  is replaced by the last one before it that does, the first frames by the first that does. Frames
  after the last one that decodes do not exist. In H.264, pictures that no other refers to are not
  decoded unless they are requested, which changes no pixel of the others.
- In all other files frame i is the i-th output of one decoder that reads the file from its start;
  damaged packets are skipped, and frames lost with them are not counted.

Pixels are those of `frame.to_ndarray(format="rgb24")`, the released checkpoints' reader: swscale
follows the stream's color tags and assumes BT.601 where there are none. Alpha is dropped, and
HDR (PQ, HLG) is not tone-mapped.

:class:`TorchcodecSource` takes the same pixels from torchcodec, on request.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast

import av
import numpy as np
import torch
from av.sidedata.sidedata import SideData
from av.sidedata.sidedata import Type as SideDataType

from v2l_fast.errors import VideoError
from v2l_fast.video.container import check_file, open_stream
from v2l_fast.video.decoder import Send, StreamDecoder, in_parallel
from v2l_fast.video.info import Deadline, Limits, Orientation, VideoInfo, fallbacks
from v2l_fast.video.packets import Packets, Timeline, read_packets

if TYPE_CHECKING:
    from torchcodec.decoders import VideoDecoder

log = logging.getLogger(__name__)

# Maximum decoders of one read, and maximum bytes of all their frames. A decoder holds up to 16
# frames (H.264), usually of 1.5 bytes a pixel.
_DECODERS = 8
_DECODER_BYTES = 2 << 30
_HELD_FRAMES = 16
# Frames of consecutive groups that one decoder reads without a seek.
_RUN = 48

# swscale's Lanczos filter with chroma at full resolution and the same bits on every CPU
# (SWS_LANCZOS, FULL_CHR_H_INT, FULL_CHR_H_INP, ACCURATE_RND, BITEXACT).
_SCALER = 1 << 9 | 1 << 13 | 1 << 14 | 1 << 18 | 1 << 19

# Matrix coefficients and range as ISO/IEC 23091-2 numbers and FFmpeg names them.
_COLOR_SPACES = {
    0: "rgb", 1: "bt709", 2: "unspecified", 4: "fcc", 5: "bt470bg", 6: "smpte170m",
    7: "smpte240m", 8: "ycgco", 9: "bt2020nc", 10: "bt2020c", 14: "ictcp",
}  # fmt: skip
_COLOR_RANGES = {0: "unspecified", 1: "tv", 2: "pc"}


@dataclass(frozen=True)
class Decoded:
    """frames: uint8 [F, H, W, 3] for the indices below `available`, in their order.

    times: seconds of each frame on the stream's own clock, counted from its first frame; NaN
    where the file has none.
    available: the number of frames that the file has, if it ends before the last requested index,
    else None.
    """

    frames: torch.Tensor
    times: tuple[float, ...]
    available: int | None


class PyAVSource:
    """A file under `limits`; every method may raise VideoError.

    Opening is lazy, and each pass over the file opens it again, because some formats cannot rewind.

    packets: the file's packet table if it was read before; otherwise all packets are read.
    scaled_to: (height, width) upright, to which FFmpeg scales frames while it converts them; None
    keeps their size. That takes a third of `resize_lanczos`'s time, and is close to its pixels but
    not equal. Set it before frames are read.
    """

    def __init__(self, path: str | os.PathLike, limits: Limits, packets: Packets | None = None):
        self.path = os.fspath(path)
        self.limits = limits
        self.deadline = Deadline(self.path, limits.max_seconds)
        self.scaled_to: tuple[int, int] | None = None
        self._num_outputs = 0
        # For a group: the last frame before it that decodes.
        self._before: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()
        check_file(self.path)
        if packets is not None:
            self.packets = packets

    @cached_property
    def info(self) -> VideoInfo:
        """Counts all packets and decodes the first frame."""
        packets, frame, orientation = self.packets, self._first_frame, self.orientation
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

    @cached_property
    def orientation(self) -> Orientation:
        """How the frames must be turned, by the first one's display matrix.

        Only the first frame's side data is read. It forms a reference cycle with its frame, which
        then returns its buffers whenever the garbage collector runs. FFmpeg decodes into returned
        buffers, and a damaged frame shows what they held where it does not decode.
        """
        data = cast(Iterable[SideData], self._first_frame.side_data)
        matrix = next((d for d in data if d.type is SideDataType.DISPLAYMATRIX), None)
        return Orientation() if matrix is None else Orientation.from_display_matrix(bytes(matrix))

    def read(
        self,
        indices: np.ndarray,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Decoded:
        """Decode frames `indices` (int64, sorted, unique, >= 0), upright.

        transform: applied in this thread to each frame (or several), uint8 [..., H, W, 3] ->
        uint8 [..., H', W', 3], before it is stored; decoding continues at the same time.
        """
        self.check_count(len(indices))
        # Computed here, before the decoding threads need them.
        timeline, _ = self._timeline, self.orientation
        jobs: list[Callable[[StreamDecoder, Send], None]]
        if timeline is None:
            jobs = [partial(self._read_through, indices)]
        else:
            inside = indices[indices < self.packets.count]
            jobs = [partial(self._read_groups, timeline, run) for run in _runs(timeline, inside)]
        kept = torch.empty(0, 0, 0, 3, dtype=torch.uint8)
        size: tuple[int, ...] = ()
        received: set[int] = set()
        substituted: set[int] = set()
        images = in_parallel(jobs, self._new_decoder, self._num_decoders(len(jobs)), self.deadline)
        with closing(images):
            for index, upright, is_substitute in images:
                if size and size != upright.shape:
                    raise VideoError(
                        f"{self.path}: the frame size changes from {size[1]}x{size[0]} to "
                        f"{upright.shape[1]}x{upright.shape[0]} at frame {index}; re-encode it"
                    )
                image = upright
                if transform is not None:
                    image = transform(torch.from_numpy(np.ascontiguousarray(upright))).numpy()
                if not size:
                    size = upright.shape
                    self.check_memory(len(indices), image.shape)
                    kept = torch.empty(len(indices), *image.shape, dtype=torch.uint8)
                # Copied by NumPy in this thread: PyTorch's threads spin while they wait for work
                # and so take the cores from the decoders, which become several times slower.
                kept.numpy()[np.searchsorted(indices, index)] = image
                received.add(index)
                if is_substitute:
                    substituted.add(index)
        available = None
        if substituted or len(received) < len(indices):
            decodable = self._num_decodable(timeline)
            available = decodable if decodable <= indices[-1] else None
        if available == 0:
            raise self.nothing_decodes()
        if available is not None:
            indices = indices[indices < available]
        if count := sum(index <= indices[-1] for index in substituted) if len(indices) else 0:
            log.warning(
                "%s: %d of the requested frames do not decode; "
                "each is replaced by the last one before it that does", self.path, count,
            )  # fmt: skip
        times = self.packets.seconds[indices].tolist()
        return Decoded(kept[: len(indices)], tuple(times), available)

    def check_count(self, num_frames: int) -> None:
        """Raise VideoError when `num_frames` exceed Limits.max_frames."""
        if num_frames > self.limits.max_frames:
            raise VideoError(
                f"{self.path}: {num_frames} frames were requested, more than "
                f"{self.limits.max_frames}; request fewer or raise Limits.max_frames"
            )

    def nothing_decodes(self) -> VideoError:
        """The error for a stream of which no frame decodes."""
        return VideoError(
            f"{self.path}: no frame can be decoded; the file is damaged, re-encode it"
        )

    def check_memory(self, num_frames: int, shape: Sequence[int]) -> None:
        """Raise VideoError when `num_frames` of `shape` (H, W, 3) exceed Limits.max_bytes."""
        size = num_frames * math.prod(shape)
        if size > self.limits.max_bytes:
            raise VideoError(
                f"{self.path}: {num_frames} frames of {shape[1]}x{shape[0]} take {size} bytes, "
                f"more than {self.limits.max_bytes}; pass longest_edge, request fewer frames or "
                "raise Limits.max_bytes"
            )

    # --- properties of the file ----------------------------------------------------------------

    @cached_property
    def packets(self) -> Packets:
        """The file's packet table."""
        with open_stream(self.path, self.limits, self.deadline) as (container, stream):
            return read_packets(self.path, container, stream, self.deadline)

    @cached_property
    def _timeline(self) -> Timeline | None:
        """The stream's timeline, if its frames keep their packets' times."""
        timeline = self.packets.timeline
        if timeline is None or timeline.index_of(self._first_frame.pts) is None:
            return None
        return timeline

    @cached_property
    def _first_frame(self) -> av.VideoFrame:
        """The first frame that decodes."""
        with self._new_decoder() as decoder:
            for frame in decoder.frames():
                return frame
        raise self.nothing_decodes()

    # --- decoding ------------------------------------------------------------------------------

    def _new_decoder(self, stop: threading.Event | None = None) -> StreamDecoder:
        return StreamDecoder(self.path, self.limits, self.deadline, stop)

    def _num_decoders(self, num_jobs: int) -> int:
        frame = self._first_frame
        fit = _DECODER_BYTES // (_HELD_FRAMES * frame.width * frame.height * 3 // 2)
        return max(1, min(_DECODERS, _num_cores(), num_jobs, fit))

    def _read_through(self, indices: np.ndarray, decoder: StreamDecoder, send: Send) -> None:
        """Send frames `indices`, counted in the order of the decoder's output."""
        wanted = set(indices.tolist())
        previous = None
        count = 0
        for frame in decoder.frames():
            if count in wanted:
                image = self._upright(frame)
                if image is None and previous is not None:
                    image = self._upright(previous)
                if image is None:
                    raise self._no_rgb()
                send((count, image, False))
            # Always kept until the next frame: the pixels of a damaged frame can depend on which
            # buffers are free.
            previous = frame
            del frame
            count += 1
            if count > indices[-1]:
                return
        self._num_outputs = count

    def _read_groups(
        self, timeline: Timeline, indices: np.ndarray, decoder: StreamDecoder, send: Send
    ) -> None:
        """Send frames `indices`, each decoded from the keyframe of its group."""
        groups = timeline.group_of(indices)
        for group in np.unique(groups).tolist():
            wanted = indices[groups == group].tolist()
            if not self._read_group(timeline, group, wanted, decoder, send):
                # The state that damage leaves in a decoder must not affect the next group.
                decoder.reopen()
                with decoder.fresh() as alone:
                    self._read_damaged_group(timeline, group, wanted, alone, send)

    def _read_group(
        self, timeline: Timeline, group: int, wanted: list[int], decoder: StreamDecoder, send: Send
    ) -> bool:
        """Send the group's `wanted` frames; False at the first sign of damage."""
        remaining = iter(wanted)
        target: int | None = next(remaining)
        expected = timeline.frames_of(group)[0]
        with closing(decoder.group(timeline, group, frozenset(wanted))) as frames:
            for index, frame in frames:
                image = self._upright(frame) if index == target else None
                damaged = frame.is_corrupt or (index == target and image is None)
                # Frames that are skipped leave gaps; a wanted one that is missing is noticed below.
                if decoder.damaged or damaged or (index != expected and not decoder.can_skip):
                    return False
                if target is not None and index > target:
                    return False
                expected += 1
                if image is not None:
                    send((index, image, False))
                    target = next(remaining, None)
                    if target is None:
                        return True
        return False

    def _read_damaged_group(
        self, timeline: Timeline, group: int, wanted: list[int], decoder: StreamDecoder, send: Send
    ) -> None:
        """Send the group's `wanted` frames, or for each the last one before it that decodes."""
        remaining = list(wanted)
        latest = None
        for index, image in self._images(decoder, timeline, group):
            while remaining and remaining[0] < index:
                if latest is None:
                    latest = self._decodable_before(timeline, group)
                send((remaining.pop(0), latest, True))
            if remaining and remaining[0] == index:
                send((remaining.pop(0), image, False))
            if not remaining:
                return
            latest = image
        for index in remaining:
            if latest is None:
                latest = self._decodable_before(timeline, group)
            send((index, latest, True))

    def _decodable_before(self, timeline: Timeline, group: int) -> np.ndarray:
        """The last frame before the group that decodes, or else the first in the file that does."""
        with self._lock:
            skipped = []
            while group not in self._before:
                skipped.append(group)
                if group > 0:
                    _, image = self._last_of(timeline, group - 1)
                else:
                    image = self._upright(self._first_frame)
                    if image is None:
                        raise self._no_rgb()
                if image is not None:
                    self._before[group] = image
                else:
                    group -= 1
            for later in skipped:
                self._before[later] = self._before[group]
            return self._before[group]

    def _num_decodable(self, timeline: Timeline | None) -> int:
        """The number of frames up to the last one that decodes."""
        if timeline is None:
            return self._num_outputs
        for group in reversed(range(timeline.num_groups)):
            index, image = self._last_of(timeline, group)
            if image is not None:
                return index + 1
        return 0

    def _last_of(self, timeline: Timeline, group: int) -> tuple[int, np.ndarray | None]:
        """The group's last frame that decodes: its index and upright image."""
        last: tuple[int, np.ndarray | None] = (-1, None)
        with self._new_decoder() as decoder:
            for item in self._images(decoder, timeline, group):
                last = item
        return last

    def _images(
        self, decoder: StreamDecoder, timeline: Timeline, group: int
    ) -> Generator[tuple[int, np.ndarray], None, None]:
        """(index, upright image) of the group's frames that decode."""
        with closing(decoder.group(timeline, group)) as frames:
            for index, frame in frames:
                image = self._upright(frame)
                # The pixels of a damaged frame can depend on which buffers are free.
                del frame
                if image is not None:
                    yield index, image

    def _upright(self, frame: av.VideoFrame) -> np.ndarray | None:
        """RGB uint8 [H, W, 3] as it is shown; None if the pixels cannot be converted."""
        options: dict[str, Any] = {}
        if self.scaled_to is not None:
            # FFmpeg would scale frames of any size to this one.
            if (frame.width, frame.height) != (self._first_frame.width, self._first_frame.height):
                raise VideoError(f"{self.path}: the frame size changes; re-encode it")
            rows, columns = self.scaled_to
            if self.orientation.transpose:
                rows, columns = columns, rows
            options = {"width": columns, "height": rows, "interpolation": _SCALER}
        try:
            coded = frame.to_ndarray(format="rgb24", **options)
        except (av.FFmpegError, ValueError):
            return None
        return self.orientation.apply(coded)

    def _no_rgb(self) -> VideoError:
        return VideoError(
            f"{self.path}: its pixels ({self._first_frame.format.name}) cannot be converted to "
            "RGB; re-encode it"
        )


def _runs(timeline: Timeline, indices: np.ndarray) -> Iterator[np.ndarray]:
    """Split `indices` between groups: one group each, or several short consecutive ones."""
    if len(indices) == 0:
        return
    groups = timeline.group_of(indices)
    start = 0
    for i in range(1, len(indices)):
        if groups[i] > groups[i - 1] + 1 or (groups[i] > groups[i - 1] and i - start >= _RUN):
            yield indices[start:i]
            start = i
    yield indices[start:]


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- torchcodec -----------------------------------------------------------------------------------

# Frames per call; the deadline is checked between calls.
_FRAMES_PER_CALL = 16


class TorchcodecSource(PyAVSource):
    """A PyAVSource whose pixels come from torchcodec; PyAV still opens, counts and describes.

    The pixels equal those of PyAV's reader, whose checks the file has passed. Files whose times do
    not locate their frames are read by PyAV (see `fallbacks`).
    """

    def read(
        self,
        indices: np.ndarray,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Decoded:
        """As PyAVSource.read; also raises VideoError when torchcodec cannot be imported."""
        try:
            from torchcodec.decoders import VideoDecoder
        except (ImportError, OSError, RuntimeError) as error:
            raise VideoError(
                f"{self.path}: backend 'torchcodec' cannot be imported "
                f"({str(error).splitlines()[0]}); install torchcodec with FFmpeg or use 'pyav'"
            ) from error
        self.check_count(len(indices))
        # torchcodec locates frames by time alone.
        if self._timeline is None or not self.packets.plain:
            fallbacks.add(self.path, "packet times do not locate its frames")
            return super().read(indices, transform)
        try:
            decoder = VideoDecoder(self.path, dimension_order="NHWC", seek_mode="exact")
            inside = indices[indices < len(decoder)]
            frames: list[torch.Tensor] = []
            for start in range(0, len(inside), _FRAMES_PER_CALL):
                self.deadline.check()
                batch = decoder.get_frames_at(inside[start : start + _FRAMES_PER_CALL].tolist())
                for image in batch.data:
                    image = self._turn_upright(image, decoder)
                    frames.append(image if transform is None else transform(image))
                    self.check_memory(len(indices), frames[0].shape)
        except VideoError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            raise VideoError(
                f"{self.path}: torchcodec cannot decode it ({str(error).splitlines()[0]}); "
                "use backend 'pyav'"
            ) from error
        available = None if len(inside) == len(indices) else len(decoder)
        if available == 0:
            raise self.nothing_decodes()
        stacked = torch.stack(frames) if frames else torch.empty(0, 0, 0, 3, dtype=torch.uint8)
        return Decoded(stacked, tuple(self.packets.seconds[inside].tolist()), available)

    def _turn_upright(self, image: torch.Tensor, decoder: VideoDecoder) -> torch.Tensor:
        """Since 0.11 torchcodec rotates frames (and reports a rotation); it never mirrors them."""
        orientation = self.orientation
        if not hasattr(decoder.metadata, "rotation"):
            return torch.from_numpy(np.ascontiguousarray(orientation.apply(image.numpy())))
        if orientation.mirrored:
            raise VideoError(
                f"{self.path}: mirrored by its display matrix, which torchcodec does not apply; "
                "use backend 'pyav'"
            )
        return image
