"""The serving engine: one thread that answers many requests at once and internalizes videos.

Requests join the running batch as soon as there is a row for them and leave it when they end, each
with an adapter of its own or none, and get the answer they would get alone. Between two decode
steps at most one unit of internalization runs, so neither waits long for the other. What a step
computes is ``v2l_fast.generation``'s; where adapters lie ``slots``'; HTTP is another file's.

Threads: submitting tokenizes and reads adapters in the caller's thread, decoding videos has workers
of its own, and all work on the device is done by one thread.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from v2l_fast.adapted import AdapterSlots
from v2l_fast.adapter import Adapter
from v2l_fast.errors import AdapterError, V2LError
from v2l_fast.generation import Batch, Row, Sampling
from v2l_fast.model import Video2LoRA
from v2l_fast.serving.background import Background
from v2l_fast.serving.graphs import GraphBatch
from v2l_fast.serving.requests import (
    EngineClosed,
    Generation,
    GenerationRequest,
    InternalizeJob,
    PromptTooLong,
    QueueFull,
    Usage,
)
from v2l_fast.serving.slots import DeviceSlots, HostAdapters, Store
from v2l_fast.serving.text import TextStream

__all__ = ["Engine", "EngineStats", "Store"]

log = logging.getLogger(__name__)

# Adapters kept in host memory for each slot on the device.
HOST_ADAPTERS_PER_SLOT = 16
# Videos decoded at the same time, for jobs and for questions about a video each.
WORKERS = 2
# Stage of the work -> state of the job, and the part of its progress that is this stage's.
STATES = {
    "decode": ("decoding", 0.0, 0.2),
    "encode frames": ("encoding", 0.2, 0.6),
    "generate adapter": ("generating", 0.6, 1.0),
}


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start, and what is there now.

    Attributes:
        running: requests being answered.
        waiting: requests in the queue.
        jobs: internalization jobs that are not finished.
        requests: finished requests by reason: stop, length, cancelled, error.
        jobs_done, jobs_failed: finished jobs.
        prompt_tokens, completion_tokens, visual_tokens: of all finished requests.
        steps: decode steps.
        adapter_hits, adapter_misses: requests whose adapter was, or was not, in a device slot.
        adapter_loads: adapters read from the store, because host memory did not have them either.
    """

    running: int
    waiting: int
    jobs: int
    requests: dict[str, int]
    jobs_done: int
    jobs_failed: int
    prompt_tokens: int
    completion_tokens: int
    visual_tokens: int
    steps: int
    adapter_hits: int
    adapter_misses: int
    adapter_loads: int


@dataclass(frozen=True)
class _Waiting:
    """A request that can join the batch."""

    generation: Generation
    prompt: Tensor | list[int]
    visual_tokens: int = 0
    adapter: Adapter | None = None


@dataclass(eq=False, kw_only=True)
class _Answer(Row):
    """A row of the batch and whose it is."""

    waiting: _Waiting
    text: TextStream
    first_token: float = 0.0
    seen: int = 0


class Engine:
    """Answers and internalizes until it is closed.

    Args:
        model: left as it is; it can be used beside the engine.
        store: where adapters come from, and where internalized ones go.
        max_batch: requests answered at once.
        max_context: tokens of prompt and answer together.
        adapter_slots: adapters on the device; more of them are moved there when needed.
        queue_limit: requests that may wait for a row, and jobs that may be unfinished.
        merged: id of one adapter whose update is added to the weights: answers cost what the plain
            model's do, and the engine answers from this adapter alone.

    Raises:
        AdapterError: ``merged`` is unknown or belongs to another model.
    """

    def __init__(
        self,
        model: Video2LoRA,
        store: Store,
        *,
        max_batch: int = 32,
        max_context: int = 2048,
        adapter_slots: int = 16,
        queue_limit: int = 256,
        merged: str | None = None,
    ) -> None:
        self._model, self._store = model, store
        self._max_context, self._queue_limit = max_context, queue_limit
        self._host = HostAdapters(model, store, HOST_ADAPTERS_PER_SLOT * adapter_slots)
        self._merged = merged
        decoder = model.backbone.decoder
        if merged is not None:
            decoder = decoder.merged(self._host.get((merged,)))
        self._slots = DeviceSlots(model, adapter_slots)
        kind = GraphBatch if decoder.device.type == "cuda" else Batch
        with torch.inference_mode():
            self._batch = kind(decoder, max_batch, max_context, model.backbone.stop_ids)

        # Guards what follows; notified whenever any of it changes.
        self._changed = threading.Condition()
        self._queue: deque[_Waiting] = deque()
        self._open: set[Generation] = set()
        self._jobs: set[InternalizeJob] = set()
        self._preparing = 0
        self._closing = self._stopped = False

        # The engine's thread's alone: rows on their way into the batch, and counters.
        self._joining: list[_Answer] = []
        self._finished = dict.fromkeys(("stop", "length", "cancelled", "error"), 0)
        self._tokens = dict.fromkeys(("prompt", "completion", "visual"), 0)
        self._jobs_ended = {"done": 0, "failed": 0}
        self._steps = 0

        self._background = Background(self._wake)
        self._job_workers = ThreadPoolExecutor(WORKERS, "v2l-internalize")
        self._question_workers = ThreadPoolExecutor(WORKERS, "v2l-question")
        self._thread = threading.Thread(target=self._run, name="v2l-engine", daemon=True)
        self._thread.start()

    # --- for callers ------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest) -> Generation:
        """Queue a question.

        Raises:
            QueueFull: too many are waiting.
            AdapterError: an adapter is unknown or belongs to another model.
            PromptTooLong: question and answer limit exceed the context. With a video in context
                that is known later, and raised by the :class:`Generation`.
            EngineClosed: the engine has been closed.
        """
        generation = Generation(request)
        if self._merged is not None and (request.adapters != (self._merged,) or request.clip):
            raise AdapterError(
                f"this engine answers from adapter {self._merged} alone, merged into the weights; "
                "start one without merged= for other adapters, none, or a video in context"
            )
        self._check_room()
        if request.clip is not None:
            with self._changed:
                self._enter(generation)
                self._preparing += 1
            self._question_workers.submit(self._prepare, generation)
            return generation
        adapter = None
        if request.adapters and self._merged is None:
            adapter = self._host.get(request.adapters)
        ids = self._model.backbone.inputs.question(request.text)
        self._check_length(len(ids), request.sampling)
        with self._changed:
            self._enter(generation)
            self._queue.append(_Waiting(generation, ids, adapter=adapter))
            self._changed.notify_all()
        return generation

    def internalize(
        self,
        path: str | os.PathLike,
        *,
        max_frames: int | None = None,
        longest_edge: int | None = None,
        exact_frames: bool = False,
    ) -> InternalizeJob:
        """Queue a video; arguments as those of :meth:`Video2LoRA.internalize`.

        Raises:
            QueueFull: too many jobs are unfinished.
            EngineClosed: the engine has been closed.
        """
        job = InternalizeJob(uuid.uuid4().hex)
        with self._changed:
            self._check_open()
            if len(self._jobs) >= self._queue_limit:
                raise QueueFull(f"{len(self._jobs)} videos are waiting; try again later")
            self._jobs.add(job)
        options = (max_frames, longest_edge, exact_frames)
        self._job_workers.submit(self._internalize, job, path, options)
        return job

    def forget(self, adapter_id: str) -> None:
        """An adapter has been deleted: the next request for it asks the store."""
        self._host.forget(adapter_id)

    def stats(self) -> EngineStats:
        """Counters of this moment."""
        with self._changed:
            return EngineStats(
                running=len(self._batch.rows),
                waiting=len(self._queue) + self._preparing,
                jobs=len(self._jobs),
                requests=dict(self._finished),
                jobs_done=self._jobs_ended["done"],
                jobs_failed=self._jobs_ended["failed"],
                prompt_tokens=self._tokens["prompt"],
                completion_tokens=self._tokens["completion"],
                visual_tokens=self._tokens["visual"],
                steps=self._steps,
                adapter_hits=self._slots.hits,
                adapter_misses=self._slots.misses,
                adapter_loads=self._host.loads,
            )

    def close(self, drain: bool = True, timeout: float = 30.0) -> None:
        """Accept nothing more; with ``drain``, finish what is there first, for up to ``timeout`` s.

        What is unfinished then ends with EngineClosed. Closing twice does no harm.
        """
        reason = EngineClosed("the server is shutting down; try again later")
        with self._changed:
            self._closing = True
            if drain:
                self._changed.wait_for(
                    lambda: self._stopped or not (self._open or self._jobs), timeout
                )
            self._stopped = True
            self._changed.notify_all()
        self._background.close(reason)
        for workers in (self._job_workers, self._question_workers):
            workers.shutdown(wait=False, cancel_futures=True)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        with self._changed:
            left, jobs = list(self._open), list(self._jobs)
        for generation in left:
            self._fail(generation, reason)
        for job in jobs:
            self._end(job, error=reason)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- entering and leaving ---------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closing:
            raise EngineClosed("the server is shutting down; try again later")

    def _check_room(self) -> None:
        self._check_open()
        waiting = len(self._queue) + self._preparing
        if waiting >= self._queue_limit:
            raise QueueFull(f"{waiting} questions are waiting; try again later")

    def _check_length(self, prompt: int, sampling: Sampling) -> None:
        if prompt + sampling.max_new_tokens > self._max_context:
            raise PromptTooLong(
                f"a prompt of {prompt} tokens and up to {sampling.max_new_tokens} of the answer "
                f"are more than {self._max_context}; shorten the question or lower the limit of "
                "new tokens"
            )

    def _enter(self, generation: Generation) -> None:
        """With the lock: count it in, unless things have changed since the first look."""
        self._check_room()
        self._open.add(generation)

    def _leave(self, generation: Generation, reason: str) -> bool:
        """Count it out, before its reader hears of it; False if it has left already."""
        with self._changed:
            if generation not in self._open:
                return False
            self._open.discard(generation)
            self._finished[reason] += 1
            self._changed.notify_all()
        return True

    def _fail(self, generation: Generation, error: V2LError) -> None:
        if self._leave(generation, "error"):
            generation.fail(error)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # --- in the workers ---------------------------------------------------------------------------

    def _prepare(self, generation: Generation) -> None:
        """The prompt of a question with its video in context."""
        request = generation.request
        try:
            steps = self._model.question_steps(request.clip, request.text)
            prompt = self._background.run(steps)
            self._check_length(len(prompt), request.sampling)
        except Exception as error:
            self._fail(generation, _told(error))
            with self._changed:
                self._preparing -= 1
            return
        with self._changed:
            self._preparing -= 1
            self._queue.append(_Waiting(generation, prompt.embeddings, prompt.visual_tokens))
            self._changed.notify_all()

    def _internalize(
        self,
        job: InternalizeJob,
        path: str | os.PathLike,
        options: tuple[int | None, int | None, bool],
    ) -> None:
        def progress(stage: str, done: int, total: int) -> None:
            state, begins, ends = STATES[stage]
            job.update(state, begins + (ends - begins) * done / total)

        try:
            steps = self._model.internalize_steps(path, *options)
            adapter = self._background.run(steps, progress)
            adapter_id = self._store.put(adapter)
            self._host.keep(adapter_id, adapter)
        except Exception as error:
            self._end(job, error=_told(error))
        else:
            self._end(job, adapter_id)

    def _end(
        self, job: InternalizeJob, adapter_id: str | None = None, error: V2LError | None = None
    ) -> None:
        with self._changed:
            if job not in self._jobs:
                return
            self._jobs.discard(job)
            state = "done" if error is None else "failed"
            self._jobs_ended[state] += 1
            job.update(state, 1.0 if error is None else job.progress, adapter_id, error)
            self._changed.notify_all()

    # --- in the engine's thread -------------------------------------------------------------------

    def _run(self) -> None:
        self._guarded(self._warm_up)
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._stopped
                    or self._queue
                    or self._batch.rows
                    or len(self._background)
                )
                if self._stopped:
                    return
            self._guarded(self._turn)
            self._background.step()

    @torch.inference_mode()
    def _guarded(self, work: Callable[[], None]) -> None:
        """One broken step must not end the service: those it belongs to are told."""
        try:
            work()
        except Exception as error:
            self._abandon(_told(error))

    def _turn(self) -> None:
        """Take in what waits, then one more token for all."""
        self._admit()
        if self._batch.rows:
            self._batch.step(self._tables(self._batch.rows))
            self._steps += 1
            self._deliver()

    def _warm_up(self) -> None:
        """Compile or capture every kind of pass, so that no request waits for it."""
        # One token, or one row, would be a kind of its own to the compiler.
        prompt = self._embedded([0, 0])
        for count in {1, min(2, self._batch.size)}:
            for tables in (None,) if self._merged else (None, self._slots.tables):
                rows = [Row(Sampling(max_new_tokens=3)) for _ in range(count)]
                try:
                    self._batch.join(rows, [prompt] * count, tables)
                    self._batch.step(tables)
                finally:
                    self._batch.rows.clear()

    def _tables(self, rows: Sequence[Row]) -> AdapterSlots | None:
        """The adapter slots, unless no row has one: the plain model is cheaper."""
        return self._slots.tables if any(row.slot >= 0 for row in rows) else None

    def _admit(self) -> None:
        """Take in what has waited longest while there are rows and slots for it."""
        with self._changed:
            for waiting in [w for w in self._queue if w.generation.cancelled]:
                self._queue.remove(waiting)
                self._finish(self._row(waiting), "cancelled")
            while self._queue and len(self._joining) < self._batch.free:
                row = self._row(self._queue.popleft())
                self._joining.append(row)
                if not self._place(row):
                    self._queue.appendleft(self._joining.pop().waiting)
                    break
        # A prompt with a video is many times longer: padding others to it would cost more.
        short = [row for row in self._joining if not row.waiting.visual_tokens]
        long = [[row] for row in self._joining if row.waiting.visual_tokens]
        for group in [short, *long] if short else long:
            prompts = [self._embedded(row.waiting.prompt) for row in group]
            self._batch.join(group, prompts, self._tables(group))
            now = time.perf_counter()
            for row in group:
                row.first_token = now
        self._joining.clear()
        self._deliver()

    def _row(self, waiting: _Waiting) -> _Answer:
        request = waiting.generation.request
        decode = partial(self._model.backbone.decode, strip=False)
        return _Answer(
            request.sampling, waiting=waiting, text=TextStream(decode, request.stop)
        )

    def _place(self, row: _Answer) -> bool:
        """Give a row its adapter's slot; False when all are in use."""
        waiting = row.waiting
        if waiting.adapter is not None:
            slot = self._slots.acquire(waiting.generation.request.adapters, waiting.adapter)
            if slot is None:
                return False
            row.slot = slot
        return True

    def _embedded(self, prompt: Tensor | list[int]) -> Tensor:
        if isinstance(prompt, Tensor):
            return prompt
        decoder = self._batch.decoder
        return decoder.embed(torch.tensor(prompt, device=decoder.device))

    def _deliver(self) -> None:
        """Send new text, and let go what has ended."""
        for row in self._batch.rows:
            text = ""
            if len(row.tokens) != row.seen:
                row.seen = len(row.tokens)
                text = row.text.push(row.tokens)
            if row.text.stopped:
                row.finished = "stop"
            elif row.finished is None and row.waiting.generation.cancelled:
                row.finished = "cancelled"
            if row.finished is not None:
                self._finish(row, row.finished, text)
            elif text:
                row.waiting.generation.put(text)
        self._batch.drop_finished()

    def _finish(self, row: _Answer, reason: str, text: str = "") -> None:
        waiting = row.waiting
        generation = waiting.generation
        first = row.first_token - generation.submitted if row.first_token else 0.0
        usage = Usage(len(waiting.prompt), len(row.tokens), waiting.visual_tokens, first)
        if row.slot >= 0:
            self._slots.release(row.slot)
        self._tokens["prompt"] += usage.prompt_tokens
        self._tokens["completion"] += usage.completion_tokens
        self._tokens["visual"] += usage.visual_tokens
        if self._leave(generation, reason):
            generation.finish(text + row.text.finish(row.tokens), reason, usage)

    def _abandon(self, error: V2LError) -> None:
        """End all rows, and those about to become one, with an error."""
        joining = [row for row in self._joining if row not in self._batch.rows]
        for row in [*self._batch.rows, *joining]:
            if row.slot >= 0:
                self._slots.release(row.slot)
            self._fail(row.waiting.generation, error)
        self._batch.rows.clear()
        self._joining.clear()


def _told(error: Exception) -> V2LError:
    """What the user is told; a bug is logged with its traceback."""
    if isinstance(error, V2LError):
        return error
    log.error("unexpected error in the engine", exc_info=error)
    return V2LError(f"internal error: {type(error).__name__}; see the server's log")
