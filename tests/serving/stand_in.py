"""An engine that answers one word at a time, at the speed a test wants.

It has the real engine's interface and serves to test the server around it.
"""

from __future__ import annotations

import dataclasses
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from v2l_fast.errors import V2LError
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.model import Video2LoRA
from v2l_fast.serving.engine import EngineStats
from v2l_fast.serving.internalize import InternalizeJob, JobCancelled
from v2l_fast.serving.request import EngineClosed, QueueFull, StreamingRequest, Usage
from v2l_fast.store.adapter_store import AdapterStore


class StandInEngine:
    """Answers with the model's own words, each after ``pause`` seconds.

    Args:
        words: the answer, instead of the model's.
        hold: answers and jobs wait until it is set or they are cancelled.
        queue_limit: questions at the same time.

    Attributes:
        ready: set by the test.
    """

    def __init__(
        self,
        model: Video2LoRA,
        store: AdapterStore,
        pause: float = 0.0,
        words: Iterable[str] | None = None,
        hold: threading.Event | None = None,
        queue_limit: int = 256,
    ) -> None:
        self.model, self.store, self.pause, self.words = model, store, pause, words
        self.hold = hold
        self.queue_limit = queue_limit
        self.running: set[StreamingRequest] = set()
        self.ended: list[str] = []
        self.closed = False
        self.ready = True
        self._threads = ThreadPoolExecutor(8)

    def submit(self, request: StreamingRequest) -> StreamingRequest:
        if self.closed:
            raise EngineClosed("closed")
        if len(self.running) >= self.queue_limit:
            raise QueueFull("full")
        self.running.add(request)
        self._threads.submit(self._answer, request)
        return request

    def submit_all(self, request: StreamingRequest) -> list[StreamingRequest]:
        return [self.submit(request)]

    def _answer(self, request: StreamingRequest) -> None:
        start = time.perf_counter()
        try:
            words, prompt, visual = self.words, 3, 0
            if words is None:
                sampling = dataclasses.asdict(request.sampling)
                if request.clip is not None:
                    (answer,) = self.model.answer_direct(request.question, request.clip, **sampling)
                else:
                    adapters = [self.store.get(i) for i in request.adapters]
                    adapter = Adapter.compose(adapters) if adapters else None
                    (answer,) = self.model.answer(request.question, adapter, **sampling)
                words = [word + " " for word in answer.text.split()]
                words[-1:] = [words[-1].rstrip()] if words else []
                prompt, visual = answer.prompt_tokens, answer.visual_tokens
            self._held(lambda: request.cancelled)
            count = 0
            for word in words:
                time.sleep(self.pause)
                if request.cancelled:
                    break
                request.deliver(word)
                count += 1
            reason = "cancelled" if request.cancelled else "stop"
            usage = Usage(prompt, count, visual, time.perf_counter() - start)
            request.complete("", reason, usage)
        except V2LError as error:
            reason = "error"
            request.abort(error)
        self.ended.append(reason)
        self.running.discard(request)

    def internalize(self, path, sampling=None, sha256=None) -> InternalizeJob:
        job = InternalizeJob(uuid.uuid4().hex)

        def work() -> None:
            try:
                job.update("decoding", 0.1)
                time.sleep(self.pause)
                self._held(lambda: job.cancellation.requested)
                adapter = self.model.internalize(path, sampling=sampling)
                job.update("generating", 0.9)
                job.update("done", 1.0, adapter_id=self.store.put(adapter))
            except V2LError as error:
                job.update("failed", job.progress, error=error)

        self._threads.submit(work)
        return job

    def cancel(self, job: InternalizeJob) -> bool:
        if job.done:
            return False
        job.cancellation.request()
        job.update("cancelled", job.progress, error=JobCancelled("cancelled"))
        return True

    def _held(self, cancelled: Callable[[], bool]) -> None:
        while self.hold is not None and not (cancelled() or self.hold.wait(0.005)):
            pass

    def forget(self, adapter_id: str) -> None:
        """Nothing is cached here."""

    def stats(self) -> EngineStats:
        fields = {f.name: 0 for f in dataclasses.fields(EngineStats)} | {"requests": {}}
        fields |= {"resident_adapters": (), "waiting_adapters": ()}
        return EngineStats(**fields | {"running": len(self.running)})

    def close(self, drain: bool = True, timeout: float = 30.0) -> None:
        self.closed = True
        if not drain:
            for request in list(self.running):
                request.cancel()
        waited = threading.Event()
        end = time.monotonic() + timeout
        while self.running and time.monotonic() < end:
            waited.wait(0.01)
        self._threads.shutdown(wait=drain)
