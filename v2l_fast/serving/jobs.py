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

from v2l_fast.errors import ConfigError
from v2l_fast.serving import logs
from v2l_fast.serving.engine import Engine
from v2l_fast.serving.limits import ServerLimits
from v2l_fast.serving.metrics import Metrics
from v2l_fast.serving.reading import VideoReader
from v2l_fast.serving.requests import InternalizeJob, QueueFull
from v2l_fast.serving.schemas import InternalizeOptions
from v2l_fast.serving.settings import InternalizeSettings
from v2l_fast.serving.store import AdapterStore, StoreError
from v2l_fast.serving.videos import ReceivedVideo, VideoFolder, clean_name

_REMEMBERED = 1024


@dataclass(frozen=True)
class Job:
    """A job and the video it is about; ``name`` is the one the video was sent with."""

    work: InternalizeJob
    sha256: str
    settings: InternalizeSettings
    name: str
    created: float = field(default_factory=time.time)

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
        self._active: dict[tuple[str, InternalizeSettings], Job] = {}
        self._by_id: OrderedDict[str, Job] = OrderedDict()

    def start(self, video: ReceivedVideo, options: InternalizeOptions) -> Job | str:
        """Internalize a video; it is kept from the moment it is known to be one.

        A refused video leaves nothing behind and pushes no other one out.

        Returns:
            The job, also when it runs already; or the adapter's id when the store has it.

        Raises:
            VideoError: it is no video, or beyond the limits.
            ConfigError: an option is beyond the limits.
            QueueFull: too many jobs are waiting.
        """
        settings = self._checked(options)
        known = self._store.find(video.sha256, settings)
        if known is not None:
            self._videos.release(self._videos.keep(video).sha256)
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
                started = True
            return job
        finally:
            if not started:
                self._discard(video.sha256)

    def _running(self, key: tuple[str, InternalizeSettings]) -> Job | None:
        """The job of the same video and settings, if there is one; call with the mutex held.

        Raises:
            QueueFull: there is none, and no room for another.
        """
        job = self._active.get(key)
        if job is None and len(self._active) >= self._limits.jobs:
            raise QueueFull(f"{self._limits.jobs} videos are waiting; try again later")
        return job

    def _discard(self, sha256: str) -> None:
        """End a use of a video; it goes when no adapter was made from it and nobody uses it."""
        self._videos.release(sha256)
        # A store that cannot be read says nothing about the video.
        with suppress(StoreError):
            if all(record.video != sha256 for record in self._store.list()):
                self._videos.delete(sha256)

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
            return [job for job in reversed(self._by_id.values()) if job.work.state != "done"]

    def collect(self) -> None:
        """Account for the jobs that have finished since the last call."""
        with self._mutex:
            finished = [(key, job) for key, job in self._active.items() if job.work.done]
            for key, _ in finished:
                del self._active[key]
            while len(self._by_id) > _REMEMBERED + len(self._active):
                oldest = next(i for i, job in self._by_id.items() if job.work.done)
                del self._by_id[oldest]
        for _, job in finished:
            work = job.work
            if work.adapter_id is None:
                result = "failed"
                self._discard(job.sha256)
            else:
                result = "internalized"
                self._videos.release(job.sha256)
            self._metrics.internalized(result, work.seconds)
            logs.event(
                "video",
                job=work.id,
                result=result,
                adapter=work.adapter_id,
                seconds={stage: round(s, 4) for stage, s in work.seconds.items()},
            )
