"""Internalization jobs as the server sees them: started once for the same video, then followed.

The engine does the work; here is what connects a job to its video, to the store's answer for the
same content, and to the limits.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field, replace

from v2l_fast.errors import AdapterError, ConfigError
from v2l_fast.serving import logs
from v2l_fast.serving.engine import Engine
from v2l_fast.serving.limits import ServerLimits
from v2l_fast.serving.metrics import Metrics
from v2l_fast.serving.reading import VideoReader
from v2l_fast.serving.requests import InternalizeJob, QueueFull
from v2l_fast.serving.schemas import InternalizeOptions
from v2l_fast.serving.videos import ReceivedVideo, VideoFolder, clean_name
from v2l_fast.store.adapter_store import AdapterStore, StoreError
from v2l_fast.store.index import StoredAdapter
from v2l_fast.store.settings import InternalizeSettings

_REMEMBERED = 1024


@dataclass(eq=False)
class Job:
    """A job and the video it is about.

    Attributes:
        name: the one the video was sent with.
        uploads: requests that joined the job and have not left it.
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
    """All jobs of a server: those that run, and the last finished ones.

    Args:
        settings: how videos are internalized when a caller says nothing.
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
        # Jobs that equal videos join, and those that :meth:`collect` has not accounted for yet.
        self._active: dict[tuple[str, InternalizeSettings], Job] = {}
        self._uncollected: set[Job] = set()
        self._by_id: OrderedDict[str, Job] = OrderedDict()

    def start(self, video: ReceivedVideo, options: InternalizeOptions) -> Job | StoredAdapter:
        """Internalize a video; it is kept from the moment it is known to be one.

        A refused video leaves nothing behind and pushes no other one out.

        Returns:
            The job, also when it runs already; or the adapter when the store has it.

        Raises:
            VideoError: it is no video, or beyond the limits.
            ConfigError: an option is beyond the limits.
            QueueFull: too many jobs are waiting.
        """
        settings = self._checked(options)
        known = self._known(video.sha256, settings)
        if known is not None:
            self.discard(self._videos.keep(video).sha256)
            self._metrics.internalized("cached", {})
            return known
        key = (video.sha256, settings)
        with self._mutex:
            running = self._running(key)
        if running is not None:
            return running
        self._reader.probe(video.path)
        kept = self._videos.keep(video)
        started = False
        try:
            with self._mutex:
                running = self._running(key)
                if running is not None:
                    return running
                work = self._engine.internalize(
                    kept.path,
                    max_frames=settings.max_frames,
                    longest_edge=settings.longest_edge,
                    exact_frames=settings.exact_frames,
                )
                job = Job(work, video.sha256, settings, clean_name(video.name))
                self._active[key] = self._by_id[job.id] = job
                self._uncollected.add(job)
                started = True
            return job
        finally:
            if not started:
                self.discard(video.sha256)

    def _known(self, sha256: str, settings: InternalizeSettings) -> StoredAdapter | None:
        adapter_id = self._store.find(sha256, settings)
        if adapter_id is None:
            return None
        try:
            return self._store.describe(adapter_id)
        except AdapterError:
            # Deleted meanwhile.
            return None

    def _running(self, key: tuple[str, InternalizeSettings]) -> Job | None:
        """The job of the same video and settings, if there is one, joined; call with the mutex
        held.

        Raises:
            QueueFull: there is none, and no room for another.
        """
        job = self._active.get(key)
        if job is not None and job.work.done:
            # It failed, or another process has deleted its adapter already.
            job = None
        if job is not None:
            job.uploads += 1
        elif len(self._uncollected) >= self._limits.jobs:
            raise QueueFull(f"{self._limits.jobs} videos are waiting; try again later")
        return job

    def join(self, job: Job) -> bool:
        """Count one more upload that follows a job; False when the job has been cancelled."""
        with self._mutex:
            if job.uploads == 0:
                return False
            job.uploads += 1
            return True

    def leave(self, job: Job) -> bool:
        """Take back one upload of a job, and cancel the job with the last one.

        Returns:
            False when the job has ended otherwise or stores its adapter: nothing has changed.
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

    def discard(self, sha256: str) -> None:
        """End a use of a video; it goes when no adapter was made from it and nobody uses it."""
        self._videos.release(sha256)
        # A store that cannot be read says nothing about the video.
        with suppress(StoreError):
            self._videos.delete(sha256, lambda: sha256 in self._internalized())

    def discard_orphans(self) -> None:
        """Remove the videos whose jobs ended with the process that ran them."""
        for sha256 in self._videos.kept() - self._internalized():
            self._videos.delete(sha256, lambda sha256=sha256: sha256 in self._internalized())

    def _internalized(self) -> set[str]:
        """Content hashes of the videos that adapters in the store were made from."""
        return {record.video for record in self._store.list() if record.video is not None}

    def _checked(self, options: InternalizeOptions) -> InternalizeSettings:
        given = {k: v for k, v in options.model_dump().items() if v is not None}
        given.pop("path", None)
        settings = replace(self._settings, **given)
        for name, limit in (
            ("max_frames", self._limits.frames),
            ("longest_edge", self._limits.longest_edge),
        ):
            if given.get(name, 0) > limit:
                raise ConfigError(f"{name} is {given[name]}, at most {limit} here")
        return settings

    def get(self, job_id: str) -> Job | None:
        """A job that runs or has finished not long ago."""
        with self._mutex:
            return self._by_id.get(job_id)

    def unfinished(self) -> list[Job]:
        """Jobs that wait, run or have failed, the newest first."""
        with self._mutex:
            jobs = list(reversed(self._by_id.values()))
        return [job for job in jobs if job.work.state not in ("done", "cancelled")]

    def collect(self) -> None:
        """Account for the jobs that have finished since the last call."""
        with self._mutex:
            finished = {job for job in self._uncollected if job.work.done}
            self._uncollected -= finished
            for job in finished:
                # A cancelled job left its place at once, and another may have it.
                if self._active.get((job.sha256, job.settings)) is job:
                    del self._active[job.sha256, job.settings]
            while len(self._by_id) > _REMEMBERED + len(self._uncollected):
                oldest = next(i for i, job in self._by_id.items() if job.work.done)
                del self._by_id[oldest]
        for job in finished:
            work = job.work
            result = "internalized" if work.state == "done" else work.state
            self.discard(job.sha256)
            self._metrics.internalized(result, work.seconds)
            logs.event(
                "video",
                job=work.id,
                result=result,
                adapter=work.adapter_id,
                seconds={stage: round(s, 4) for stage, s in work.seconds.items()},
            )
