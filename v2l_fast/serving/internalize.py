"""The engine's video jobs: workers read videos, the engine's thread runs the model on them.

:class:`TaskInterleaver` gives the engine's thread one bounded unit of such work between two decode
steps, so that neither answers nor jobs starve.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from v2l_fast.errors import ConfigError, V2LError
from v2l_fast.serving.request import EngineClosed, Notifier, QueueFull, user_facing_error
from v2l_fast.video import Clip, FrameSampling
from v2l_fast.work_units import Progress, WorkUnit, silent

if TYPE_CHECKING:
    from v2l_fast.model import Video2LoRA
    from v2l_fast.serving.device_cache import HostAdapterCache, Store

# Videos read at the same time.
WORKERS = 2
# Visual tokens of one video. The memory of a context grows linearly with them (one buffer of width
# 960 in float32 takes 0.5 GB), the time quadratically.
MAX_VISUAL_TOKENS = 131072
# Stage of the work -> state of the job, and the range of its progress in this stage.
STATES = {
    "decode": ("decoding", 0.0, 0.2),
    "encode frames": ("encoding", 0.2, 0.6),
    "generate adapter": ("generating", 0.6, 1.0),
}

Result = TypeVar("Result")


# --- jobs -----------------------------------------------------------------------------------------


class JobCancelled(V2LError):
    """The job was cancelled through :meth:`Cancellation.request`."""


class Cancellation:
    """Asks, from any thread, that work in another thread stop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requested = False
        self._stop: Callable[[], None] | None = None

    @property
    def requested(self) -> bool:
        """Whether the work should stop."""
        return self._requested

    def request(self) -> None:
        """Ask the work to stop, and call the ``stop`` of a :meth:`stopping` block it is in."""
        with self._lock:
            self._requested = True
            if self._stop is not None:
                self._stop()

    def check(self) -> None:
        """Raise JobCancelled if the work should stop."""
        if self._requested:
            raise JobCancelled("the job was cancelled")

    @contextmanager
    def stopping(self, stop: Callable[[], None]) -> Iterator[None]:
        """A block that ends early when ``stop`` is called, which :meth:`request` then does.

        Raises:
            JobCancelled: the request came before the block.
        """
        with self._lock:
            self.check()
            self._stop = stop
        try:
            yield
        finally:
            with self._lock:
                self._stop = None


@dataclass(eq=False)
class InternalizeJob:
    """The job that turns one video into an adapter.

    Attributes:
        id: id of the job.
        state: "queued", "decoding", "encoding", "generating", "done", "failed" or "cancelled".
        progress: 0 to 1.
        adapter_id: in the store, when done.
        error: why it failed or was cancelled.
        seconds: time spent in each state so far.
        cancellation: requested by :meth:`Engine.cancel`.
    """

    id: str
    state: str = "queued"
    progress: float = 0.0
    adapter_id: str | None = None
    error: V2LError | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    cancellation: Cancellation = field(default_factory=Cancellation, repr=False)
    _notifier: Notifier = field(default_factory=Notifier, repr=False)
    _since: float = field(default_factory=time.perf_counter, repr=False)

    @property
    def done(self) -> bool:
        """Whether the job has ended."""
        return self.state in ("done", "failed", "cancelled")

    def wait(self, timeout: float | None = None) -> str:
        """Wait for the adapter's id.

        Raises:
            TimeoutError: the job has not ended after ``timeout`` seconds.
            JobCancelled: the job was cancelled.
            V2LError: the job failed.
        """
        with self._notifier.condition:
            if not self._notifier.condition.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"job {self.id} is still {self.state} after {timeout} s")
        if self.adapter_id is None:
            raise self.error or EngineClosed("the engine stopped")
        return self.adapter_id

    async def ended(self) -> None:
        """Wait on the running event loop until the job has ended."""
        await self._notifier.wait_for(lambda: self.done)

    def update(
        self,
        state: str,
        progress: float,
        adapter_id: str | None = None,
        error: V2LError | None = None,
    ) -> None:
        """Enter a state or make progress in it; no effect on a job that has ended."""
        now = time.perf_counter()
        with self._notifier.condition:
            if self.done:
                return
            self.seconds[self.state] = self.seconds.get(self.state, 0.0) + now - self._since
            self._since = now
            self.adapter_id, self.error = adapter_id, error
            self.state, self.progress = state, progress
            self._notifier.notify()


# (path, sampling, cancellation, sha256) -> clip.
LoadClip = Callable[[str | os.PathLike, FrameSampling, Cancellation, str | None], Clip]


class Internalizer:
    """The jobs of one engine.

    Args:
        store: receives the adapters.
        host_adapters: also receives them, for the questions that follow.
        interleaver: runs the work that needs the model.
        changed: the engine's lock, notified when a job ends.
        limit: jobs that may be unfinished.
        load_clip: reads a video, in a worker. By default :meth:`Video2LoRA.load_clip`, which reads
            to the end even when the job is cancelled.

    Attributes:
        unfinished: jobs that wait or run; guarded by ``changed``.
        ended: number of ended jobs: "done", "failed" and "cancelled".
    """

    def __init__(
        self,
        model: Video2LoRA,
        store: Store,
        host_adapters: HostAdapterCache,
        interleaver: TaskInterleaver,
        changed: threading.Condition,
        limit: int,
        load_clip: LoadClip | None = None,
    ) -> None:
        self.unfinished: set[InternalizeJob] = set()
        self.ended = {"done": 0, "failed": 0, "cancelled": 0}
        self._model, self._store, self._host_adapters = model, store, host_adapters
        self._interleaver, self._changed = interleaver, changed
        self._limit, self._load_clip = limit, load_clip or self._load_here
        # Jobs whose adapter is being stored.
        self._storing: set[InternalizeJob] = set()
        self._workers = ThreadPoolExecutor(WORKERS, "v2l-internalize")

    def start(
        self, path: str | os.PathLike, sampling: FrameSampling, sha256: str | None = None
    ) -> InternalizeJob:
        """Queue a video; call with the engine's lock held.

        Raises:
            QueueFull: too many jobs are unfinished.
        """
        if len(self.unfinished) >= self._limit:
            raise QueueFull(f"{len(self.unfinished)} videos are waiting; try again later")
        job = InternalizeJob(uuid.uuid4().hex)
        self.unfinished.add(job)
        self._workers.submit(self._run, job, path, sampling, sha256)
        return job

    def cancel(self, job: InternalizeJob) -> bool:
        """End a job as "cancelled", at once; at most the running work unit is still completed.

        Returns:
            False if the job has ended or is storing its adapter.
        """
        with self._changed:
            if job not in self.unfinished or job in self._storing:
                return False
            job.cancellation.request()
            self._end(job, error=JobCancelled("the job was cancelled"))
            return True

    def shut_down(self) -> None:
        """Start no further job."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    def fail_all(self, reason: V2LError) -> None:
        """End the unfinished jobs with an error."""
        with self._changed:
            jobs = list(self.unfinished)
        for job in jobs:
            self._end(job, error=reason)

    def _run(
        self,
        job: InternalizeJob,
        path: str | os.PathLike,
        sampling: FrameSampling,
        sha256: str | None,
    ) -> None:
        def report(stage: str, done: int, total: int) -> None:
            state, begin, end = STATES[stage]
            job.update(state, begin + (end - begin) * done / total)

        try:
            job.cancellation.check()
            report("decode", 0, 1)
            clip = self._load_clip(path, sampling, job.cancellation, sha256)
            self._check_length(clip, sampling.longest_edge)
            units = self._model.iter_internalize(clip, sampling)
            adapter = self._interleaver.run(units, report, job.cancellation)
            with self._changed:
                job.cancellation.check()
                self._storing.add(job)
            adapter_id = self._store.put(adapter)
            self._host_adapters.add(adapter_id, adapter)
        except Exception as error:
            self._end(job, error=user_facing_error(error))
        else:
            self._end(job, adapter_id)

    def _load_here(
        self,
        path: str | os.PathLike,
        sampling: FrameSampling,
        cancellation: Cancellation,
        sha256: str | None,
    ) -> Clip:
        return self._model.load_clip(path, sampling)

    def _check_length(self, clip: Clip, edge: int) -> None:
        tokens = self._model.visual_tokens(clip, edge)
        if tokens > MAX_VISUAL_TOKENS:
            raise ConfigError(
                f"{len(clip.frames)} frames at a longest edge of {edge} pixels are {tokens} visual "
                f"tokens, more than the limit of {MAX_VISUAL_TOKENS}; lower longest_edge or "
                "max_frames"
            )

    def _end(
        self, job: InternalizeJob, adapter_id: str | None = None, error: V2LError | None = None
    ) -> None:
        with self._changed:
            if job not in self.unfinished:
                return
            self.unfinished.discard(job)
            self._storing.discard(job)
            state = "done" if error is None else "failed"
            if isinstance(error, JobCancelled):
                state = "cancelled"
            self.ended[state] += 1
            job.update(state, 1.0 if error is None else job.progress, adapter_id, error)
            self._changed.notify_all()


# --- work units -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    units: Generator[WorkUnit, None, Any]
    progress: Progress
    cancellation: Cancellation
    result: Future


class TaskInterleaver:
    """Runs generators of work units in the engine's thread, one unit of each in turn.

    Args:
        wake: called when there is work.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._tasks: deque[_Task] = deque()
        self._closed: V2LError | None = None

    def __len__(self) -> int:
        return len(self._tasks)

    def run(
        self,
        units: Generator[WorkUnit, None, Result],
        progress: Progress | None = None,
        cancellation: Cancellation | None = None,
    ) -> Result:
        """In a worker thread: run the "decode" units here, and wait for the rest.

        Raises:
            JobCancelled: ``cancellation`` was requested; no further unit runs.
            V2LError: raised by a unit, or the reason of :meth:`close`.
        """
        # Frames on a GPU are resized by this thread while the engine's passes run. Both use the
        # device's default stream, so the frames are complete when the engine reads them.
        progress = progress or silent
        cancellation = cancellation or Cancellation()
        stage = "decode"
        while stage == "decode":
            cancellation.check()
            if self._closed is not None:
                raise self._closed
            unit = stage, _, _ = next(units)
            progress(*unit)
        task = _Task(units, progress, cancellation, Future())
        with self._lock:
            if self._closed is not None:
                raise self._closed
            self._tasks.append(task)
        self._wake()
        return task.result.result()

    def run_unit(self) -> bool:
        """In the engine's thread: run one unit of the next task; False if there is no task."""
        with self._lock:
            if not self._tasks:
                return False
            task = self._tasks.popleft()
        try:
            task.cancellation.check()
            unit = next(task.units)
        except StopIteration as end:
            task.result.set_result(end.value)
            return True
        except Exception as error:
            # The thread that waits for the task knows whose error it is.
            task.result.set_exception(error)
            return True
        task.progress(*unit)
        with self._lock:
            if self._closed is None:
                self._tasks.append(task)
                return True
        # Closed while the task was not in the queue.
        task.result.set_exception(self._closed)
        return True

    def close(self, reason: V2LError) -> None:
        """End the remaining and all later tasks with ``reason``."""
        with self._lock:
            self._closed = reason
            tasks, self._tasks = list(self._tasks), deque()
        for task in tasks:
            task.result.set_exception(reason)
