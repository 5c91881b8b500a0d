"""Internalization jobs as the server sees them: started once for the same video, then followed.

The engine does the work; here is what connects a job to its video, to the store's answer for the
same content, and to the limits.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace

from v2l_fast.errors import ConfigError
from v2l_fast.serving import logs
from v2l_fast.serving.engine import Engine
from v2l_fast.serving.limits import ServerLimits
from v2l_fast.serving.metrics import Metrics
from v2l_fast.serving.reading import VideoReader
from v2l_fast.serving.requests import InternalizeJob, QueueFull, room
from v2l_fast.serving.schemas import InternalizeOptions
from v2l_fast.serving.settings import InternalizeSettings
from v2l_fast.serving.store import AdapterStore
from v2l_fast.serving.videos import KeptVideo, VideoFolder

_REMEMBERED = 1024
# Files looked into, or waiting for it, at the same time: each holds a thread of the web server's.
_LOOKS = 16


@dataclass(frozen=True)
class Job:
    """A job and the video it is about."""

    work: InternalizeJob
    sha256: str
    settings: InternalizeSettings
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
        self._looks = threading.Semaphore(_LOOKS)
        self._active: dict[tuple[str, InternalizeSettings], Job] = {}
        self._by_id: OrderedDict[str, Job] = OrderedDict()

    def start(self, video: KeptVideo, options: InternalizeOptions) -> Job | str:
        """Internalize a video that is in use; releases it when that is over.

        Returns:
            The job, also when it runs already; or the adapter's id when the store has it.

        Raises:
            VideoError: it is no video, or beyond the limits.
            ConfigError: an option is beyond the limits.
            QueueFull: too many jobs are waiting, or files being looked into.
        """
        started = False
        try:
            settings = self._checked(options)
            found = self._store.find(video.sha256, settings)
            if found is not None:
                self._metrics.internalized("cached", {})
                return found
            key = (video.sha256, settings)
            with self._mutex:
                if key in self._active:
                    return self._active[key]
            # Decoding a whole queue of files only to refuse them would be the costly way.
            with room(self._looks):
                self._reader.probe(video.path)
            with self._mutex:
                if key in self._active:
                    return self._active[key]
                if len(self._active) >= self._limits.jobs:
                    raise QueueFull(f"{self._limits.jobs} videos are waiting; try again later")
                work = self._engine.internalize(
                    video.path,
                    max_frames=settings.max_frames,
                    longest_edge=settings.longest_edge,
                    exact_frames=settings.exact_frames,
                )
                job = Job(work, video.sha256, settings)
                self._active[key] = self._by_id[job.id] = job
                started = True
            return job
        finally:
            if not started:
                self._videos.release(video.sha256)

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
            self._videos.release(job.sha256)
            result = "failed" if work.adapter_id is None else "internalized"
            self._metrics.internalized(result, work.seconds)
            logs.event(
                "video",
                job=work.id,
                result=result,
                adapter=work.adapter_id,
                seconds={stage: round(s, 4) for stage, s in work.seconds.items()},
            )
