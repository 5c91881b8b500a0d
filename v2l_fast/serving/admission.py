"""Videos on their way in: how many are received and looked into at once, and which are the same.

Whoever does not fit waits on the event loop, without a thread; only a full queue is refused.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.concurrency import run_in_threadpool

from v2l_fast.serving.jobs import Job, Jobs
from v2l_fast.serving.limits import ServerLimits
from v2l_fast.serving.requests import QueueFull
from v2l_fast.serving.schemas import InternalizeOptions
from v2l_fast.serving.videos import ReceivedVideo
from v2l_fast.store.index import StoredAdapter

# Bytes received at the same time, in uploads of the largest size: they lie in the staging folder.
_LARGEST_UPLOADS = 8
# Files looked into at the same time: each holds a thread of the web server's.
_LOOKS = 8


class Admission:
    """Receiving videos and starting their jobs; used by one event loop.

    Args:
        jobs: where they are started.
    """

    def __init__(self, jobs: Jobs, limits: ServerLimits) -> None:
        self._jobs = jobs
        self._most = limits.uploads
        self._most_bytes = _LARGEST_UPLOADS * limits.upload_bytes
        self._most_waiting = limits.uploads_waiting
        self._received = self._received_bytes = 0
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()
        self._looks = asyncio.Semaphore(_LOOKS)
        self._starting: dict[tuple[str, str], asyncio.Task[Job | StoredAdapter]] = {}

    @asynccontextmanager
    async def receiving(self, size: int) -> AsyncIterator[None]:
        """Held while a file of at most ``size`` bytes arrives or is hashed; first come, first
        served.

        Raises:
            QueueFull: too many are waiting.
        """
        size = min(size, self._most_bytes)
        await self._enter(size)
        try:
            yield
        finally:
            self._leave(size)

    async def _enter(self, size: int) -> None:
        if not self._waiting and self._fits(size):
            self._take(size)
            return
        if len(self._waiting) >= self._most_waiting:
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
        return self._received < self._most and self._received_bytes + size <= self._most_bytes

    def _take(self, size: int) -> None:
        self._received += 1
        self._received_bytes += size

    def _leave(self, size: int) -> None:
        self._received -= 1
        self._received_bytes -= size
        while self._waiting and self._fits(self._waiting[0][1]):
            turn, waited = self._waiting.popleft()
            self._take(waited)
            turn.set_result(None)

    async def start(self, video: ReceivedVideo, options: InternalizeOptions) -> Job | StoredAdapter:
        """:meth:`Jobs.start`; equal videos with equal options that arrive meanwhile share it."""
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
        async with self._looks:
            return await run_in_threadpool(self._jobs.start, video, options)
