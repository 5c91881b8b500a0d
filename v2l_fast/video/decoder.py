"""A decoder of one open file in one thread, and jobs on several decoders at a time.

Responsible for feeding FFmpeg the packets of a stream or of one group of pictures, past damaged
ones, and for running jobs in parallel. `pyav` decides which frames a file has.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import ExitStack

import av
import numpy as np

from v2l_fast.video.container import check_size, open_stream
from v2l_fast.video.info import Deadline, Limits
from v2l_fast.video.packets import Timeline

log = logging.getLogger(__name__)

# Continuing to demux over at most this many frames costs less than a seek.
_SEEK_GAIN = 24

# Frame index, upright image uint8 [H, W, 3], whether it is another frame's image in its place.
Image = tuple[int, np.ndarray, bool]
Send = Callable[[Image], None]


class _Stopped(Exception):
    """The consumer of the frames has stopped."""


class _Lost(Exception):
    """The keyframe does not follow this position."""


class StreamDecoder:
    """A file and its best video stream, decoded in the calling thread alone.

    damaged: whether a packet of the current group failed to decode.
    can_skip: whether frames that no other refers to can be left out without changing the others.
    Opening raises VideoError; decoding raises it for frames beyond the limits and when the deadline
    has passed. MemoryError is not converted, because it is no fault of the file.
    """

    def __init__(
        self, path: str, limits: Limits, deadline: Deadline, stop: threading.Event | None = None
    ) -> None:
        self._path, self._limits, self._deadline, self._stop = path, limits, deadline, stop
        self.damaged = False
        self._stack = ExitStack()
        self.reopen()

    def __enter__(self) -> StreamDecoder:
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def fresh(self) -> StreamDecoder:
        """Another decoder of the same file."""
        return StreamDecoder(self._path, self._limits, self._deadline, self._stop)

    def reopen(self) -> None:
        """Reset to the state of a new decoder."""
        self._stack.close()
        opened = open_stream(self._path, self._limits, self._deadline)
        self._container, self._stream = self._stack.enter_context(opened)
        self._context = self._stream.codec_context
        self._context.thread_count = 1
        # In H.264, a picture of nal_ref_idc 0 changes no other one. HEVC's flag is weaker.
        self.can_skip = self._context.codec.canonical_name == "h264"
        self._demuxed = self._container.demux(self._stream)
        # Packets of later groups that were read together with those of earlier ones.
        self._ahead: deque[av.Packet] = deque()
        self._next_group: int | None = 0

    def frames(self) -> Generator[av.VideoFrame, None, None]:
        """All frames of a newly opened file that decode, in presentation order."""
        failures = 0
        for packet in itertools.chain(self._rest(), (None,)):
            frames = self._decode(packet)
            if frames is None:
                failures += 1
            while frames:
                yield frames.pop(0)
        if failures:
            log.warning("%s: %d damaged packets were skipped", self._path, failures)

    def group(
        self, timeline: Timeline, group: int, wanted: Collection[int] | None = None
    ) -> Generator[tuple[int, av.VideoFrame], None, None]:
        """(index, frame) of the group's frames that decode, in presentation order.

        Decoding starts at the group's keyframe. Closing the generator early leaves the decoder
        ready for another group.

        wanted: indices of frames; where `can_skip`, others that no frame refers to are not decoded.
        """
        self.damaged = False
        needed = wanted if self.can_skip else None
        first, stop = timeline.frames_of(group)
        previous = first - 1
        try:
            for packet in itertools.chain(self._packets_of(timeline, group), (None,)):
                if needed is not None and packet is not None:
                    is_needed = timeline.index_of(packet.pts) in needed
                    self._context.skip_frame = "DEFAULT" if is_needed else "NONREF"
                frames = self._decode(packet)
                if frames is None:
                    # A keyframe's leading pictures cannot decode here; they are another group's.
                    index = None if packet is None else timeline.index_of(packet.pts)
                    self.damaged |= index is None or first <= index < stop
                while frames:
                    frame = frames.pop(0)
                    index = timeline.index_of(frame.pts)
                    if index is not None and previous < index < stop:
                        previous = index
                        yield index, frame
                    del frame
        finally:
            self._context.flush_buffers()
            self._context.skip_frame = "DEFAULT"

    def _decode(self, packet: av.Packet | None) -> list[av.VideoFrame] | None:
        """The decoder's frames after a packet (None: the rest); None if the packet is damaged."""
        self._check()
        try:
            frames = self._context.decode(packet)
        except av.EOFError:
            return []
        except MemoryError:
            raise
        except av.FFmpegError:
            return None
        for frame in frames:
            check_size(self._path, frame.width, frame.height, self._limits)
        return frames

    def _check(self) -> None:
        self._deadline.check()
        if self._stop is not None and self._stop.is_set():
            raise _Stopped

    def _rest(self) -> Iterator[av.Packet]:
        """The packets from the current position on."""
        while True:
            self._check()
            try:
                packet = self._ahead.popleft() if self._ahead else next(self._demuxed, None)
            except MemoryError:
                raise
            except av.FFmpegError:
                # The rest of the file cannot be read, but the decoder may still hold frames.
                self._deadline.check()
                packet = None
            # The last packet is empty.
            if packet is None or packet.size == 0:
                return
            yield packet

    def _packets_of(self, timeline: Timeline, group: int) -> Iterator[av.Packet]:
        """The group's packets, from its keyframe to the last one that belongs to it."""
        keyframe = self._find(timeline, group)
        if keyframe is None:
            return
        self._next_group = group + 1
        last = timeline.last[group]
        following = timeline.keyframes[group + 1] if group + 1 < timeline.num_groups else None
        ahead: deque[av.Packet] = deque()
        try:
            for packet in itertools.chain((keyframe,), self._rest()):
                if ahead or (following is not None and packet.pts == following):
                    ahead.append(packet)
                yield packet
                if packet.pts == last:
                    return
        finally:
            self._ahead = ahead + self._ahead

    def _find(self, timeline: Timeline, group: int) -> av.Packet | None:
        """The group's keyframe, after which the next packets follow; None if it is missing."""
        key = timeline.keyframes[group]
        try:
            current = self._next_group
            if current is None or not 0 <= timeline.distance(current, group) <= _SEEK_GAIN:
                self._ahead.clear()
                self._container.seek(int(key), stream=self._stream, backward=True)
                self._demuxed = self._container.demux(self._stream)
            return self._scan(int(key))
        except (_Lost, av.FFmpegError):
            self._deadline.check()
        log.info("%s: seeking is not exact here, reading from the start", self._path)
        self.reopen()
        try:
            return self._scan(int(key))
        except _Lost:
            self._next_group = None
            return None

    def _scan(self, key: int) -> av.Packet:
        """The keyframe shown at time `key`, after the current position. Raises _Lost."""
        for packet in self._rest():
            if packet.pts == key:
                return packet
            if packet.is_keyframe and packet.pts is not None and packet.pts > key:
                break
        raise _Lost


def in_parallel(
    jobs: Sequence[Callable[[StreamDecoder, Send], None]],
    new_decoder: Callable[[threading.Event], StreamDecoder],
    count: int,
    deadline: Deadline,
) -> Generator[Image, None, None]:
    """The images that `jobs` send, in any order; `count` threads run them, each with a decoder.

    They decode at most a few frames ahead of the consumer. Closing the generator stops them. Raises
    a job's exception, and VideoError when the deadline passes.
    """
    waiting = deque(jobs)
    stop = threading.Event()
    results: queue.Queue[Image | BaseException | None] = queue.Queue(maxsize=count)

    def send(result: Image | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return results.put(result, timeout=0.5)
            except queue.Full:
                pass
        raise _Stopped

    def work() -> None:
        try:
            with new_decoder(stop) as decoder:
                while waiting:
                    try:
                        job = waiting.popleft()
                    except IndexError:
                        break
                    job(decoder, send)
            send(None)
        except _Stopped:
            pass
        except BaseException as error:
            try:
                send(error)
            except _Stopped:
                pass

    threads = [threading.Thread(target=work, name="decoder", daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    running = count
    try:
        while running:
            try:
                result = results.get(timeout=1)
            except queue.Empty:
                deadline.check()
                continue
            if result is None:
                running -= 1
            elif isinstance(result, BaseException):
                raise result
            else:
                yield result
    finally:
        stop.set()
        for thread in threads:
            thread.join()
