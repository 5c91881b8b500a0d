"""The server's jobs that turn videos into adapters: admission, deduplication and bookkeeping.

The engine does the work. :class:`Admission` bounds how many videos are received and examined at
once, and joins equal ones; :class:`Jobs` connects a job to its video, to the adapter that the store
may already have, and to the limits.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

from starlette.concurrency import run_in_threadpool

from v2l_fast.errors import AdapterError, ConfigError
from v2l_fast.serving.engine import Engine
from v2l_fast.serving.internalize import InternalizeJob
from v2l_fast.serving.monitoring import Metrics, log_event
from v2l_fast.serving.request import QueueFull
from v2l_fast.serving.sandbox import VideoReader
from v2l_fast.serving.schemas import InternalizeOptions, ServerLimits
from v2l_fast.serving.videos import ReceivedVideo, VideoFolder, clean_name
from v2l_fast.store.adapter_store import AdapterStore, InternalizeSettings, StoreError
from v2l_fast.store.folder import StoredAdapter

# Ended jobs that are remembered.
_REMEMBERED = 1024
# Limit on the bytes received at the same time, in uploads of the largest size; the staging folder
# holds them.
_LARGEST_UPLOADS = 8
# Files examined at the same time: each holds a thread of the web server.
_EXAMINED = 8


@dataclass(eq=False)
class Job:
    """A job of the engine and its video.

    Attributes:
        work: the engine's job.
        sha256: hash of the video's bytes.
        name: file name of the first upload.
        created: Unix time in seconds.
        uploads: requests that joined the job and have not withdrawn.
    """

    work: InternalizeJob
    sha256: str
    settings: InternalizeSettings
    name: str
    created: float = field(default_factory=time.time)
    uploads: int = 1

    @property
    def id(self) -> str:
        return self.work.id


class Jobs:
    """The jobs of a server: all that have not ended, and the last ones that have.

    Args:
        settings: default settings of internalizing.
    """

    def __init__(
        self,
        engine: Engine,
        store: AdapterStore,
        reader: VideoReader,
        videos: VideoFolder,
        settings: InternalizeSettings,
        limits: ServerLimits,
        metrics: Metrics,
    ) -> None:
        self._engine = engine
        self._store = store
        self._reader = reader
        self._videos = videos
        self._settings = settings
        self._limits = limits
        self._metrics = metrics
        self._mutex = threading.Lock()
        # Jobs that equal videos join, and jobs that :meth:`collect` has not seen ended.
        self._active: dict[tuple[str, InternalizeSettings], Job] = {}
        self._uncollected: set[Job] = set()
        self._by_id: OrderedDict[str, Job] = OrderedDict()

    def start(self, video: ReceivedVideo, options: InternalizeOptions) -> Job | StoredAdapter:
        """Internalize a video. Its file is kept once it is known to be a video.

        A refused video leaves nothing behind and displaces no other.

        Returns:
            The job, which may have been running already, or the adapter if the store has it.

        Raises:
            VideoError: not a video, or beyond the limits.
            ConfigError: an option is beyond the limits.
            QueueFull: too many jobs are waiting.
        """
        settings = self._settings_of(options)
        stored = self._stored(video.sha256, settings)
        if stored is not None:
            self.release(self._videos.keep(video).sha256)
            self._metrics.count_video("cached", {})
            return stored
        key = (video.sha256, settings)
        with self._mutex:
            running = self._join_running(key)
        if running is not None:
            return running
        self._reader.probe(video.path)
        file = self._videos.keep(video)
        started = False
        try:
            with self._mutex:
                running = self._join_running(key)
                if running is not None:
                    return running
                work = self._engine.internalize(
                    file.path,
                    settings.sampling,
                    sha256=file.trusted_sha256,
                )
                job = Job(work, video.sha256, settings, clean_name(video.name))
                self._active[key] = self._by_id[job.id] = job
                self._uncollected.add(job)
                started = True
            return job
        finally:
            if not started:
                self.release(video.sha256)

    def find(self, sha256: str, options: InternalizeOptions) -> StoredAdapter | None:
        """The adapter of a video with these options, if the store has it.

        Raises:
            ConfigError: an option is beyond the limits.
        """
        return self._stored(sha256, self._settings_of(options))

    def _stored(self, sha256: str, settings: InternalizeSettings) -> StoredAdapter | None:
        adapter_id = self._store.find(sha256, settings)
        if adapter_id is None:
            return None
        try:
            return self._store.describe(adapter_id)
        except AdapterError:
            # Deleted in the meantime.
            return None

    def _join_running(self, key: tuple[str, InternalizeSettings]) -> Job | None:
        """Join the job of the same video and settings, if there is one; call with the mutex held.

        Raises:
            QueueFull: there is none, and no room for another.
        """
        job = self._active.get(key)
        if job is not None and job.work.done:
            # It failed, or another process has already deleted its adapter.
            job = None
        if job is not None:
            job.uploads += 1
        elif len(self._uncollected) >= self._limits.jobs:
            raise QueueFull(f"{self._limits.jobs} videos are waiting; try again later")
        return job

    def join(self, job: Job) -> bool:
        """Count one more upload that follows a job; False if the job has been cancelled."""
        with self._mutex:
            if job.uploads == 0:
                return False
            job.uploads += 1
            return True

    def withdraw(self, job: Job) -> bool:
        """Withdraw one upload from a job; the last one cancels it.

        Returns:
            False if the job has ended otherwise or is storing its adapter; nothing has changed.
        """
        with self._mutex:
            if job.work.state == "cancelled":
                return True
            if job.uploads > 1 and not job.work.done:
                job.uploads -= 1
                return True
            if not self._engine.cancel(job.work):
                return False
            job.uploads = 0
            del self._active[job.sha256, job.settings]
        self.collect()
        return True

    def release(self, sha256: str) -> None:
        """End a use of a video; remove it if it has no adapter and no other use."""
        self._videos.release(sha256)
        # A store that cannot be read says nothing about the video.
        with suppress(StoreError):
            self._videos.delete(sha256, lambda: sha256 in self._internalized())

    def remove_orphans(self) -> None:
        """Remove the videos whose jobs ended with the process that ran them."""
        for sha256 in self._videos.kept() - self._internalized():
            self._videos.delete(sha256, lambda sha256=sha256: sha256 in self._internalized())

    def _internalized(self) -> set[str]:
        """Content hashes of the videos that have an adapter in the store."""
        return {record.video for record in self._store.list() if record.video is not None}

    def _settings_of(self, options: InternalizeOptions) -> InternalizeSettings:
        changes = options.model_dump(exclude_none=True, exclude={"path"})
        for name, limit in (
            ("max_frames", self._limits.frames),
            ("longest_edge", self._limits.longest_edge),
        ):
            if changes.get(name, 0) > limit:
                raise ConfigError(f"{name} must be at most {limit} here, got {changes[name]}")
        return replace(self._settings, sampling=self._settings.sampling.override(**changes))

    def get(self, job_id: str) -> Job | None:
        """A job that runs or has ended recently."""
        with self._mutex:
            return self._by_id.get(job_id)

    def unfinished(self) -> list[Job]:
        """Jobs that wait, run or have failed, the newest first."""
        with self._mutex:
            jobs = list(reversed(self._by_id.values()))
        return [job for job in jobs if job.work.state not in ("done", "cancelled")]

    def collect(self) -> None:
        """Release, count and log the jobs that have ended since the last call."""
        with self._mutex:
            ended = {job for job in self._uncollected if job.work.done}
            self._uncollected -= ended
            for job in ended:
                # A cancelled job has left its entry, and another may have taken it.
                if self._active.get((job.sha256, job.settings)) is job:
                    del self._active[job.sha256, job.settings]
            while len(self._by_id) > _REMEMBERED + len(self._uncollected):
                oldest = next(i for i, job in self._by_id.items() if job.work.done)
                del self._by_id[oldest]
        for job in ended:
            work = job.work
            result = "internalized" if work.state == "done" else work.state
            self.release(job.sha256)
            self._metrics.count_video(result, work.seconds)
            log_event(
                "video",
                job=work.id,
                result=result,
                adapter=work.adapter_id,
                seconds={stage: round(s, 4) for stage, s in work.seconds.items()},
            )


class ReceiveSlots:
    """Slots for bodies that are received at the same time; used by one event loop.

    A body that does not fit waits on the event loop, without a thread, first in, first out. Only a
    full queue refuses.

    Args:
        count, size: maximum number of bodies, and of their bytes together.
        waiting: number of bodies that may wait.
    """

    def __init__(self, count: int, size: int, waiting: int) -> None:
        self._max_count, self._max_bytes, self._max_waiting = count, size, waiting
        self._count = self._bytes = 0
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()

    @asynccontextmanager
    async def hold(self, size: int) -> AsyncIterator[None]:
        """Hold a slot while a body of at most ``size`` bytes is received and used.

        Raises:
            QueueFull: too many bodies are waiting.
        """
        size = min(size, self._max_bytes)
        await self._enter(size)
        try:
            yield
        finally:
            self._leave(size)

    async def _enter(self, size: int) -> None:
        if not self._waiting and self._fits(size):
            self._add(size)
            return
        if len(self._waiting) >= self._max_waiting:
            raise QueueFull("too many uploads are waiting; try again later")
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((turn, size))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._waiting.remove((turn, size))
            else:
                self._leave(size)
            raise

    def _fits(self, size: int) -> bool:
        return self._count < self._max_count and self._bytes + size <= self._max_bytes

    def _add(self, size: int) -> None:
        self._count += 1
        self._bytes += size

    def _leave(self, size: int) -> None:
        self._count -= 1
        self._bytes -= size
        while self._waiting and self._fits(self._waiting[0][1]):
            turn, waiting_size = self._waiting.popleft()
            self._add(waiting_size)
            turn.set_result(None)


class Admission:
    """Receives videos and starts their jobs; used by one event loop."""

    def __init__(self, jobs: Jobs, limits: ServerLimits) -> None:
        self._jobs = jobs
        self._uploads = ReceiveSlots(
            limits.uploads, _LARGEST_UPLOADS * limits.upload_bytes, limits.uploads_waiting
        )
        self._examined = asyncio.Semaphore(_EXAMINED)
        self._starting: dict[tuple[str, str], asyncio.Task[Job | StoredAdapter]] = {}

    def receiving(self, size: int) -> AbstractAsyncContextManager[None]:
        """Hold a slot while a file of at most ``size`` bytes is received or hashed.

        Raises:
            QueueFull: too many uploads are waiting.
        """
        return self._uploads.hold(size)

    async def start(self, video: ReceivedVideo, options: InternalizeOptions) -> Job | StoredAdapter:
        """:meth:`Jobs.start`; equal videos and options that arrive while it runs share it."""
        key = (video.sha256, options.model_dump_json(exclude={"path"}))
        task = self._starting.get(key)
        joins = task is not None
        if task is None:
            task = asyncio.create_task(self._start(video, options))
            self._starting[key] = task
            task.add_done_callback(lambda _: self._starting.pop(key))
        # Cancelling one caller leaves the others their job.
        job = await asyncio.shield(task)
        if joins and isinstance(job, Job) and not self._jobs.join(job):
            return await self.start(video, options)
        return job

    async def _start(
        self, video: ReceivedVideo, options: InternalizeOptions
    ) -> Job | StoredAdapter:
        async with self._examined:
            return await run_in_threadpool(self._jobs.start, video, options)
