"""Reads video files that callers send, each in a process of its own.

A crafted file may crash FFmpeg, hang it, or make it take all memory. Every file is therefore
examined, and on the CPU decoded, in a fresh process. It is forked from one that has imported all
modules and never reads a file itself; any failure in it becomes a VideoError for that file alone.
It returns JSON and pixels: nothing that a file could have tampered with is unpickled. The process
runs as the server's user: it isolates crashes, time and memory, not privileges.

A GPU decodes in the server's process, because its driver's state cannot be shared and frames stay
on the device. By then the file has been examined in a process of its own; files that the GPU cannot
decode go to FFmpeg, in a process of its own again.
"""

from __future__ import annotations

import ctypes
import io
import json
import logging
import math
import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from fractions import Fraction
from itertools import pairwise
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from v2l_fast.errors import ConfigError, V2LError, VideoError
from v2l_fast.serving.internalize import Cancellation, JobCancelled
from v2l_fast.serving.monitoring import configure_logging
from v2l_fast.video import (
    Clip,
    FrameSampling,
    Limits,
    VideoInfo,
    fallbacks,
    load_spans,
)
from v2l_fast.video.container import check_size
from v2l_fast.video.packets import Packets
from v2l_fast.video.reader import open_source, resolve_backend

if TYPE_CHECKING:
    from av import VideoFrame

    from v2l_fast.model import Video2LoRA
    from v2l_fast.serving.schemas import ServerLimits

log = logging.getLogger(__name__)

# Imported before any process is forked: what reading needs, and the module that each process
# imports again because the program was started from it.
PRELOAD = ("v2l_fast.serving.sandbox", "v2l_fast.video.pyav", "v2l_fast.cli")
# Files examined at the same time; the callers of :meth:`VideoReader.load` bound decoding.
PROBES = 4
# Bytes of all packet tables that wait for their files to be decoded; an hour at 30 fps takes 2 MB.
TABLE_BYTES = 64 << 20
_PROCESSES = multiprocessing.get_context("forkserver")
# Grace period in seconds before the timer kills a task that missed its own deadline.
_GRACE = 1.0
# Seconds for a killed process to disappear: the kernel frees its memory first.
_REAP_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1
# First bytes of an image -> FFmpeg's format.
_IMAGES = {b"\x89PNG\r\n": "png_pipe", b"\xff\xd8\xff": "jpeg_pipe", b"BM": "bmp_pipe"}
_ERRORS = {kind.__name__: kind for kind in (ConfigError, VideoError)}

# task(path, limits, *options) -> a JSON object, and uint8 frames [F, ...] or None. The other
# process finds it by its name.
Task = Callable[..., tuple[dict[str, Any], torch.Tensor | None]]


class VideoReader:
    """Examines and decodes the videos of one server.

    Args:
        model: the model that the frames are for.
        limits: bounds on files and on the processes that read them.
    """

    def __init__(self, model: Video2LoRA, limits: ServerLimits) -> None:
        self._device = model.backbone.decoder.device
        self._limits = limits
        self._sandbox = Sandbox(limits.decode_bytes, PRELOAD)
        self._probing = threading.Semaphore(PROBES)
        # Packet tables of probed files, newest last: a file that is probed is soon decoded.
        self._tables: OrderedDict[tuple[int, ...], bytes] = OrderedDict()
        self._mutex = threading.Lock()

    @staticmethod
    def preload() -> None:
        """Start the imports that the first file would wait for, before there is a model."""
        start_forkserver(PRELOAD)

    def probe(self, path: str | os.PathLike) -> VideoInfo:
        """:func:`v2l_fast.video.probe` in a process of its own.

        Raises:
            VideoError: not a video, beyond the limits, or it crashed its reader.
            V2LError: the reader has been closed, or no process can be started.
        """
        with self._probing:
            key = _identity(path)
            info, table = self._sandbox.run(_probe, path, self._limits.probing)
        if table is not None and key is not None and table.nbytes <= TABLE_BYTES:
            with self._mutex:
                self._tables[key] = table.tobytes()
                while sum(map(len, self._tables.values())) > TABLE_BYTES:
                    self._tables.popitem(last=False)
        return VideoInfo(**info)

    def load(
        self,
        path: str | os.PathLike,
        sampling: FrameSampling,
        cancellation: Cancellation | None = None,
        sha256: str | None = None,
    ) -> Clip:
        """:func:`v2l_fast.video.load_video` on the CPU, in a process of its own.

        A file that :meth:`probe` has examined, even under another name, is not examined again.

        Args:
            cancellation: kills the process when it is requested.
            sha256: hash of the file's bytes if it is known; otherwise the file is hashed.

        Raises:
            JobCancelled: ``cancellation`` was requested.
            VideoError, V2LError: as :meth:`probe`.
        """
        key = _identity(path)
        with self._mutex:
            table = None if key is None else self._tables.pop(key, None)
        fields, frames = self._sandbox.run(
            _load, path, self._limits.decoding, sampling, sha256, table, cancellation=cancellation
        )
        return Clip(
            frames=torch.from_numpy(frames),
            indices=np.array(fields.pop("indices"), dtype=np.int64),
            timestamps=tuple(fields.pop("timestamps")),
            presentation_times=tuple(fields.pop("presentation_times")),
            **fields,
        )

    def load_clip(
        self,
        path: str | os.PathLike,
        sampling: FrameSampling,
        cancellation: Cancellation | None = None,
        sha256: str | None = None,
    ) -> Clip:
        """:meth:`Video2LoRA.load_clip` of a file: by the GPU if it can, else :meth:`load`.

        The frames are on the model's device. A GPU decodes to the end even when it is cancelled.
        """
        if resolve_backend("auto", self._device) == "dali":
            try:
                (clip,) = load_spans(
                    path,
                    sampling,
                    limits=self._limits.decoding,
                    backend="dali",
                    device=self._device,
                    sha256=sha256,
                )
                return clip
            except VideoError as error:
                fallbacks.add(os.fspath(path), "not by the GPU", str(error))
        clip = self.load(path, sampling, cancellation, sha256)
        return replace(clip, frames=clip.frames.to(self._device))

    def write_frames(
        self, path: str | os.PathLike, ends: Sequence[int], target: str | os.PathLike
    ) -> None:
        """Write a video of images, lossless, one a second, in a process of its own.

        Args:
            path: a file of concatenated PNG, JPEG, WebP or BMP images.
            ends: offset of the end of each of them.
            target: path of the video; equal images give equal bytes.

        Raises:
            VideoError: an image cannot be read, or they differ in size.
            V2LError: as :meth:`probe`.
        """
        with self._probing:
            self._sandbox.run(_write_frames, path, self._limits.probing, ends, os.fspath(target))

    def close(self, reason: V2LError) -> None:
        """Kill the processes that read; running and later calls raise ``reason``."""
        self._sandbox.close(reason)


def image_format(head: bytes) -> str | None:
    """FFmpeg's format of an image that begins with ``head`` (12 bytes); None for another file."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp_pipe"
    return next((name for start, name in _IMAGES.items() if head.startswith(start)), None)


# --- processes ------------------------------------------------------------------------------------


def start_forkserver(modules: Sequence[str]) -> None:
    """Start the process that the others are forked from, which imports ``modules``.

    A program has one of them: later calls do not change what it imported.
    """
    forkserver.set_forkserver_preload(list(modules))
    forkserver.ensure_running()


class Sandbox:
    """Runs tasks, from any thread, each in a process of its own.

    Args:
        memory: bytes that one task may take.
        modules: as of :func:`start_forkserver`.
    """

    def __init__(self, memory: int, modules: Sequence[str]) -> None:
        self._memory = memory
        start_forkserver(modules)
        # multiprocessing's own bookkeeping is not thread-safe.
        self._mutex = threading.Lock()
        self._running: set[BaseProcess] = set()
        self._closed: V2LError | None = None

    def run(
        self,
        task: Task,
        path: str | os.PathLike,
        limits: Limits,
        *options: object,
        cancellation: Cancellation | None = None,
    ) -> tuple[dict[str, Any], np.ndarray | None]:
        """The result of ``task(path, limits, *options)``.

        Args:
            cancellation: kills the task's process when it is requested.

        Raises:
            JobCancelled: ``cancellation`` was requested.
            ConfigError, VideoError: raised by the task.
            VideoError: the process crashed or exceeded its time or memory.
            V2LError: no process can be started, or the reason of :meth:`close`.
        """
        path = os.fspath(path)
        cancellation = cancellation or Cancellation()
        receiving, sending = _PROCESSES.Pipe(duplex=False)
        arguments = sending, self._memory, task, path, limits, *options
        process = _PROCESSES.Process(target=_run_task, args=arguments, daemon=True)
        with receiving:
            with sending, self._mutex:
                if self._closed is not None:
                    raise self._closed
                _start(process)
                self._running.add(process)
            result = None
            with suppress(EOFError, OSError, JobCancelled), cancellation.stopping(process.kill):
                result = _receive(receiving)
        with self._mutex:
            self._running.discard(process)
            # No effect on a process that has ended, nor on its exit code.
            process.kill()
        wait([process.sentinel], _REAP_SECONDS)
        with self._mutex:
            process.join(0)
        if result is None:
            cancellation.check()
            if self._closed is not None:
                raise self._closed
            log.warning("%s: its reader ended with exit code %s", path, process.exitcode)
            raise VideoError(f"{path}: {_reason(process.exitcode, limits)}")
        fields, frames = result
        if "error" in fields:
            raise _ERRORS.get(fields["error"], V2LError)(fields["message"])
        return fields, frames

    def close(self, reason: V2LError) -> None:
        """Kill the running tasks; running and later calls raise ``reason``."""
        with self._mutex:
            self._closed = reason
            for process in self._running:
                process.kill()


def _start(process: BaseProcess) -> None:
    try:
        process.start()
    except (EOFError, OSError) as error:
        raise V2LError(f"cannot start a process to read videos ({error!r})") from None


def _reason(code: int | None, limits: Limits) -> str:
    if code == -signal.SIGALRM:
        return f"reading it takes more than {limits.max_seconds:g} s; shorten the clip"
    how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
    return f"reading it crashed the decoder ({how}); re-encode it"


def _receive(connection: Connection) -> tuple[dict[str, Any], np.ndarray | None]:
    """Receive what :func:`_run_task` sends; raises EOFError if its process ends before that."""
    fields = json.loads(connection.recv_bytes())
    shape = fields.pop("shape", None)
    if shape is None:
        return fields, None
    frames = np.empty((shape[0], math.prod(shape[1:])), dtype=np.uint8)
    for frame in frames:
        connection.recv_bytes_into(frame)
    return fields, frames.reshape(shape)


def _identity(path: str | os.PathLike) -> tuple[int, ...] | None:
    """Identity of a file that renaming does not change; None if it cannot be read."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


# --- in the other process -------------------------------------------------------------------------


def _probe(path: str, limits: Limits) -> tuple[dict[str, Any], torch.Tensor]:
    """The file's properties, and its packet table as one row of bytes."""
    source = open_source(path, "pyav", limits)
    fields = asdict(source.info)
    return fields, torch.frombuffer(bytearray(source.packets.to_bytes()), dtype=torch.uint8)[None]


def _load(
    path: str,
    limits: Limits,
    sampling: FrameSampling,
    sha256: str | None,
    table: bytes | None,
) -> tuple[dict[str, Any], torch.Tensor]:
    # The table comes from a process that the file may have taken over, and is read in another.
    packets = None if table is None else Packets.from_bytes(table)
    (clip,) = load_spans(
        path, sampling, limits=limits, backend="pyav", sha256=sha256, packets=packets
    )
    fields = {
        "indices": clip.indices.tolist(),
        "timestamps": clip.timestamps,
        "presentation_times": clip.presentation_times,
        "fps": clip.fps,
        "duration": clip.duration,
        "num_frames": clip.num_frames,
        "sha256": clip.sha256,
        "path": clip.path,
    }
    return fields, clip.frames


def _write_frames(
    path: str, limits: Limits, ends: Sequence[int], target: str
) -> tuple[dict[str, Any], None]:
    import av

    if len(ends) > limits.max_frames:
        raise VideoError(f"{path}: {len(ends)} images, more than the limit of {limits.max_frames}")
    data = Path(path).read_bytes()
    try:
        # Otherwise the file would contain its creation time.
        exact = {"fflags": "+bitexact"}
        with av.open(target, "w", format="mov", container_options=exact) as container:
            stream = None
            for index, (start, end) in enumerate(pairwise([0, *ends])):
                frame = _decode_image(path, data[start:end], limits)
                if stream is None:
                    stream = container.add_stream("png", rate=1)
                    stream.width, stream.height = frame.width, frame.height
                    stream.pix_fmt = "rgb24"
                elif (frame.width, frame.height) != (stream.width, stream.height):
                    raise VideoError(f"{path}: the images differ in size; send them in one size")
                frame = frame.reformat(format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1)
                container.mux(stream.encode(frame))
            assert stream is not None
            container.mux(stream.encode(None))
    except (av.FFmpegError, ValueError) as error:
        raise VideoError(f"{path}: an image cannot be read ({error}); convert it to PNG") from None
    return {}, None


def _decode_image(path: str, data: bytes, limits: Limits) -> VideoFrame:
    import av

    kind = image_format(data[:12])
    if kind is None:
        raise VideoError(f"{path}: not an image of a known type; send PNG, JPEG, WebP or BMP")
    with av.open(io.BytesIO(data), format=kind) as container:
        stream = container.streams.video[0]
        check_size(path, stream.codec_context.width, stream.codec_context.height, limits)
        stream.codec_context.options = {"max_pixels": str(limits.max_pixels)}
        frame = next(container.decode(stream), None)
        if frame is None:
            raise VideoError(f"{path}: an image is incomplete; send it again")
        return frame


def _run_task(
    connection: Connection, memory: int, task: Task, path: str, limits: Limits, *options: object
) -> None:
    """Run a task under limits that also bind native code, and send its result."""
    _end_with_server()
    # Ctrl-C is meant for the server, which finishes its work.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure_logging("warning")
    _limit_memory(memory)
    # The signal is not handled, so it ends the process in any state, with or without a server.
    signal.setitimer(signal.ITIMER_REAL, limits.max_seconds + _GRACE)
    frames = None
    try:
        fields, frames = task(path, limits, *options)
    except V2LError as error:
        fields = {"error": type(error).__name__, "message": str(error)}
    except (MemoryError, RuntimeError) as error:
        # PyTorch raises RuntimeError when the CPU's memory is exhausted.
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        message = f"{path}: reading it takes more than {memory / 1e9:g} GB of memory; scale it down"
        fields = {"error": VideoError.__name__, "message": message}
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror or error})"
        fields = {"error": VideoError.__name__, "message": message}
    shape = {} if frames is None else {"shape": frames.shape}
    connection.send_bytes(json.dumps(fields | shape).encode())
    if frames is not None:
        for frame in frames.flatten(1).numpy():
            connection.send_bytes(frame)


def _end_with_server() -> None:
    """Let the kernel kill this process when the server ends for whatever reason.

    The fork server ends when no process holds the server's end of a pipe any more, and takes this
    process with it. This process inherited a copy of that end, for children of its own. The fork
    server lives while the copy is open, so arming the signal first leaves no gap.
    """
    if sys.platform == "linux":
        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
        os.close(forkserver._forkserver._forkserver_alive_fd)


def _limit_memory(allowance: int) -> None:
    """Bound this process's address space to its current size plus ``allowance``; no core dumps."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + allowance
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
