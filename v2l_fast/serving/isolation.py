"""Native code on untrusted files, in a process of its own for each file.

A crafted file may crash FFmpeg, hang it, or have it take all memory. So every file is read in a
fresh process, forked from one that has imported what that takes and never reads a file itself;
whatever happens there is a VideoError here, for this file alone. What comes back is JSON and
pixels: nothing that a file could have tampered with is unpickled.

Responsible for that process, its limits and its end; what it does is the caller's. It is no
sandbox: it runs as the server's user.
"""

from __future__ import annotations

import ctypes
import json
import logging
import math
import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from v2l_fast.errors import ConfigError, V2LError, VideoError
from v2l_fast.serving import logs
from v2l_fast.serving.requests import Cancellation, JobCancelled
from v2l_fast.video import Limits

log = logging.getLogger(__name__)

_PROCESSES = multiprocessing.get_context("forkserver")
# Seconds by which a task may overrun its time limit, which it is to keep itself.
_GRACE = 1.0
# Seconds for a killed process to be gone: the kernel first frees its memory.
_END = 60.0
_PR_SET_PDEATHSIG = 1
_ERRORS = {kind.__name__: kind for kind in (ConfigError, VideoError)}

# A file, its limits and more -> JSON, and uint8 frames [F, ..] or None. Found by its name in the
# other process.
Task = Callable[..., tuple[dict[str, Any], torch.Tensor | None]]


def prepare(modules: Sequence[str]) -> None:
    """Start the process that others are forked from; returns at once, while it imports.

    There is one for the whole program: it stays as it was started first.
    """
    forkserver.set_forkserver_preload(list(modules))
    forkserver.ensure_running()


class Isolation:
    """Runs tasks, from any thread, each in a process of its own.

    Args:
        memory: bytes that one task may take.
        modules: what the process they are forked from imports, see :func:`prepare`.
    """

    def __init__(self, memory: int, modules: Sequence[str]) -> None:
        self._memory = memory
        prepare(modules)
        # multiprocessing's own bookkeeping is not made for several threads.
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
        """What ``task(path, limits, *options)`` returns.

        Args:
            cancellation: kills the task's process when it is requested.

        Raises:
            JobCancelled: ``cancellation`` was requested.
            ConfigError, VideoError: of the task.
            VideoError: its process crashed, or took more time or memory than it may.
            V2LError: no process can be started, or the reason of :meth:`close`.
        """
        path = os.fspath(path)
        cancellation = cancellation or Cancellation()
        receiving, sending = _PROCESSES.Pipe(duplex=False)
        arguments = sending, self._memory, task, path, limits, *options
        process = _PROCESSES.Process(target=_work, args=arguments, daemon=True)
        with receiving:
            with sending, self._mutex:
                if self._closed is not None:
                    raise self._closed
                _start(process)
                self._running.add(process)
            result = None
            with suppress(EOFError, OSError, JobCancelled), cancellation.stopping(process.kill):
                result = _received(receiving)
        with self._mutex:
            self._running.discard(process)
            # Has no effect on one that has ended, and its exit code.
            process.kill()
        wait([process.sentinel], _END)
        with self._mutex:
            process.join(0)
        if result is None:
            cancellation.check()
            if self._closed is not None:
                raise self._closed
            log.warning("%s: reading it ended with exit code %s", path, process.exitcode)
            raise VideoError(f"{path}: {_reason(process.exitcode, limits)}")
        found, frames = result
        if "error" in found:
            raise _ERRORS.get(found["error"], V2LError)(found["message"])
        return found, frames

    def close(self, reason: V2LError) -> None:
        """End what runs, and whatever comes, with ``reason``."""
        with self._mutex:
            self._closed = reason
            for process in self._running:
                process.kill()


def _start(process: BaseProcess) -> None:
    try:
        process.start()
    except (EOFError, OSError) as error:
        raise V2LError(f"no process to read videos in can be started ({error!r})") from None


def _reason(code: int | None, limits: Limits) -> str:
    if code == -signal.SIGALRM:
        return f"reading it takes more than {limits.max_seconds:g} s; shorten the clip"
    how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
    return f"reading it crashed the decoder ({how}); re-encode it"


def _received(connection: Connection) -> tuple[dict[str, Any], np.ndarray | None]:
    """What :func:`_work` sends; EOFError when its process ends before that."""
    found = json.loads(connection.recv_bytes())
    shape = found.pop("shape", None)
    if shape is None:
        return found, None
    frames = np.empty((shape[0], math.prod(shape[1:])), dtype=np.uint8)
    for frame in frames:
        connection.recv_bytes_into(frame)
    return found, frames.reshape(shape)


# --- in the other process ---------------------------------------------------------------------


def _work(
    connection: Connection, memory: int, task: Task, path: str, limits: Limits, *options: object
) -> None:
    """Run a task within limits that hold for native code, too, and send its result."""
    _end_with_the_server()
    # Ctrl-C is for the server, which finishes what is under way.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logs.configure("warning")
    _limit_memory(memory)
    # Unhandled, the signal ends the process, whatever it is in, and whether or not there still is
    # a server.
    signal.setitimer(signal.ITIMER_REAL, limits.max_seconds + _GRACE)
    frames = None
    try:
        found, frames = task(path, limits, *options)
    except V2LError as error:
        found = {"error": type(error).__name__, "message": str(error)}
    except (MemoryError, RuntimeError) as error:
        # PyTorch has no error of its own for it.
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        message = f"{path}: reading it takes more than {memory / 1e9:g} GB of memory; scale it down"
        found = {"error": VideoError.__name__, "message": message}
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror or error})"
        found = {"error": VideoError.__name__, "message": message}
    shape = {} if frames is None else {"shape": frames.shape}
    connection.send_bytes(json.dumps(found | shape).encode())
    if frames is not None:
        for frame in frames.flatten(1).numpy():
            connection.send_bytes(frame)


def _end_with_the_server() -> None:
    """Have the kernel kill this process when the server ends, however that does.

    The process this one was forked from ends when no process that holds the server's end of a
    pipe is left, and takes this one with it. This process was handed a copy of that end, for
    children of its own. While it holds the copy its parent lives, so the order leaves no gap.
    """
    if sys.platform == "linux":
        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
        os.close(forkserver._forkserver._forkserver_alive_fd)


def _limit_memory(more: int) -> None:
    """Bound this process's address space to what it has and ``more`` bytes; leave no core dump."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
