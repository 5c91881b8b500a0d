"""Videos on their way to adapters: workers read them, the engine's thread runs the model on them.

Responsible for a job from its start to its end; what runs when in the engine's thread is
``background``'s, how the server follows jobs ``jobs``'.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from v2l_fast.errors import ConfigError, V2LError
from v2l_fast.model import Video2LoRA
from v2l_fast.serving.background import Background
from v2l_fast.serving.requests import (
    Cancellation,
    InternalizeJob,
    JobCancelled,
    QueueFull,
    told,
)
from v2l_fast.serving.slots import HostAdapters, Store
from v2l_fast.video import Clip

# Videos read at the same time.
WORKERS = 2
# Visual tokens of one video. The memory of a context grows with its tokens (at a width of 960 and
# float32 one buffer of these is 0.5 GB), the time with their square.
MAX_VISUAL_TOKENS = 131072
# Stage of the work -> state of the job, and the part of its progress that is this stage's.
STATES = {
    "decode": ("decoding", 0.0, 0.2),
    "encode frames": ("encoding", 0.2, 0.6),
    "generate adapter": ("generating", 0.6, 1.0),
}

# As Video2LoRA.internalize: max_frames, longest_edge, exact_frames.
Options = tuple[int | None, int | None, bool]
# (path, max_frames, longest_edge, exact_frames, cancellation, sha256) -> clip.
LoadClip = Callable[
    [str | os.PathLike, int | None, int | None, bool, Cancellation, str | None], Clip
]


class Internalization:
    """The jobs of one engine.

    Args:
        store: where adapters go.
        host: gets them too, for the questions that follow.
        background: runs what needs the model.
        changed: the engine's lock, notified when a job ends.
        limit: jobs that may be unfinished.
        load_clip: reads a video, in a worker; :meth:`Video2LoRA.load_clip` when None, which reads
            to the end whatever is cancelled.

    Attributes:
        unfinished: jobs that wait or run; guarded by ``changed``.
        ended: finished jobs: "done", "failed" and "cancelled".
    """

    def __init__(
        self,
        model: Video2LoRA,
        store: Store,
        host: HostAdapters,
        background: Background,
        changed: threading.Condition,
        limit: int,
        load_clip: LoadClip | None = None,
    ) -> None:
        self.unfinished: set[InternalizeJob] = set()
        self.ended = {"done": 0, "failed": 0, "cancelled": 0}
        self._model, self._store, self._host = model, store, host
        self._background, self._changed = background, changed
        self._limit, self._load_clip = limit, load_clip or self._load_here
        # Jobs whose adapter is on its way to the disk.
        self._storing: set[InternalizeJob] = set()
        self._workers = ThreadPoolExecutor(WORKERS, "v2l-internalize")

    def start(
        self, path: str | os.PathLike, options: Options, sha256: str | None = None
    ) -> InternalizeJob:
        """Queue a video; call with the lock.

        Raises:
            QueueFull: too many jobs are unfinished.
        """
        if len(self.unfinished) >= self._limit:
            raise QueueFull(f"{len(self.unfinished)} videos are waiting; try again later")
        job = InternalizeJob(uuid.uuid4().hex)
        self.unfinished.add(job)
        self._workers.submit(self._work, job, path, options, sha256)
        return job

    def cancel(self, job: InternalizeJob) -> bool:
        """End a job as "cancelled"; whether it has been.

        It is over at once, a process that reads its video is killed, and at most the unit of work
        that runs is finished. False for a job that has ended or whose adapter is being stored.
        """
        with self._changed:
            if job not in self.unfinished or job in self._storing:
                return False
            job.cancellation.request()
            self._end(job, error=JobCancelled("the job was cancelled"))
            return True

    def stop(self) -> None:
        """Begin no other job."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    def fail(self, reason: V2LError) -> None:
        """End what is unfinished."""
        with self._changed:
            left = list(self.unfinished)
        for job in left:
            self._end(job, error=reason)

    def _work(
        self, job: InternalizeJob, path: str | os.PathLike, options: Options, sha256: str | None
    ) -> None:
        def progress(stage: str, done: int, total: int) -> None:
            state, begins, ends = STATES[stage]
            job.update(state, begins + (ends - begins) * done / total)

        try:
            job.cancellation.check()
            progress("decode", 0, 1)
            clip = self._load_clip(path, *options, job.cancellation, sha256)
            self._check_length(clip, options[1])
            steps = self._model.iter_internalize(clip, *options)
            adapter = self._background.run(steps, progress, job.cancellation)
            with self._changed:
                job.cancellation.check()
                self._storing.add(job)
            adapter_id = self._store.put(adapter)
            self._host.keep(adapter_id, adapter)
        except Exception as error:
            self._end(job, error=told(error))
        else:
            self._end(job, adapter_id)

    def _load_here(
        self,
        path: str | os.PathLike,
        max_frames: int | None,
        longest_edge: int | None,
        exact_frames: bool,
        cancellation: Cancellation,
        sha256: str | None,
    ) -> Clip:
        return self._model.load_clip(path, max_frames, longest_edge, exact_frames)

    def _check_length(self, clip: Clip, longest_edge: int | None) -> None:
        tokens = self._model.visual_tokens(clip, longest_edge)
        if tokens > MAX_VISUAL_TOKENS:
            edge = self._model.config.sampling.override(longest_edge=longest_edge).longest_edge
            raise ConfigError(
                f"{len(clip.frames)} frames at a longest edge of {edge} pixels are {tokens} visual "
                f"tokens, at most {MAX_VISUAL_TOKENS} are accepted; lower longest_edge or "
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
