"""Open files that decode: one file, one position, one thread each; several of them at a time.

Responsible for feeding FFmpeg the packets of a stream or of one group of pictures, past whatever
is damaged, and for running jobs on several decoders. Which frames a file has is `pyav_source`'s.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import av
import numpy as np

from v2l_fast.video.limits import Deadline, Limits
from v2l_fast.video.opening import check_size, open_stream
from v2l_fast.video.packets import Timeline

log = logging.getLogger(__name__)

# Demuxing on over fewer frames than this costs less than a seek.
_SEEK_GAIN = 24

# Frame index, upright image uint8 [H, W, 3], whether another frame's image stands in.
Image = tuple[int, np.ndarray, bool]
Send = Callable[[Image], None]


class _Stopped(Exception):
    """Nobody wants the frames any more."""


class _Lost(Exception):
    """The keyframe looked for does not come after this position."""


class Decoder:
    """A file and its best video stream, decoded in the calling thread alone.

    damaged: whether a packet of the group being decoded failed.
    Opening raises VideoError; decoding raises it for frames beyond the limits and a passed
    deadline. MemoryError is raised as it is: it is no fault of the file's.
    """

    def __init__(
        self, path: str, limits: Limits, deadline: Deadline, stop: threading.Event | None = None
    ) -> None:
        self._path, self._limits, self._deadline, self._stop = path, limits, deadline, stop
        self.damaged = False
        self._stack = ExitStack()
        self.reopen()

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def fresh(self) -> Decoder:
        """Another decoder of the same file."""
        return Decoder(self._path, self._limits, self._deadline, self._stop)

    def reopen(self) -> None:
        """Start anew, as a new decoder does."""
        self._stack.close()
        opened = open_stream(self._path, self._limits, self._deadline)
        self._container, self._stream = self._stack.enter_context(opened)
        self._context = self._stream.codec_context
        self._context.thread_count = 1
        self._demuxed = self._container.demux(self._stream)
        # Packets of the groups to come that were read with those before them.
        self._ahead: deque[av.Packet] = deque()
        self._next_group: int | None = 0

    def frames(self) -> Iterator[av.VideoFrame]:
        """All frames of a newly opened file that decode, in presentation order."""
        failures = 0
        for packet in itertools.chain(self._rest(), (None,)):
            frames = self._decode(packet)
            if frames is None:
                failures += 1
            while frames:
                yield frames.pop(0)
        if failures:
            log.warning("%s: %d damaged packets were passed over", self._path, failures)

    def group(self, timeline: Timeline, group: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """(index, frame) of the group's frames that decode, in presentation order.

        They are decoded from their keyframe on. Closing the iterator early leaves the decoder
        ready for another group.
        """
        self.damaged = False
        first, stop = timeline.frames_of(group)
        previous = first - 1
        try:
            for packet in itertools.chain(self._packets_of(timeline, group), (None,)):
                frames = self._decode(packet)
                if frames is None:
                    # A keyframe's leading pictures cannot decode here, and belong elsewhere.
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

    def _decode(self, packet: av.Packet | None) -> list[av.VideoFrame] | None:
        """Frames that came out; None when the packet does not decode. Without one: the rest."""
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
        """Packets from here on."""
        while True:
            self._check()
            try:
                packet = self._ahead.popleft() if self._ahead else next(self._demuxed, None)
            except MemoryError:
                raise
            except av.FFmpegError:
                # The rest of the file cannot be read; what the decoder still holds can.
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
        """The group's keyframe; the packets after it come next. None where it is not."""
        key = timeline.keyframes[group]
        try:
            here = self._next_group
            if here is None or not 0 <= timeline.distance(here, group) <= _SEEK_GAIN:
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
        """The keyframe shown at `key`, from here on. Raises _Lost."""
        for packet in self._rest():
            if packet.pts == key:
                return packet
            if packet.is_keyframe and packet.pts is not None and packet.pts > key:
                break
        raise _Lost


def in_parallel(
    jobs: Sequence[Callable[[Decoder, Send], None]],
    new_decoder: Callable[[threading.Event], Decoder],
    count: int,
    deadline: Deadline,
) -> Iterator[Image]:
    """What `jobs` send, in any order; `count` threads run them, each with a decoder of its own.

    They decode at most a few frames ahead of who iterates. Closing the iterator ends them. Raises
    what a job raises, and VideoError when the deadline passes.
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
