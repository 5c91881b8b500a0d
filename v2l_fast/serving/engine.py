"""The serving engine: one thread that answers many requests at once and internalizes videos.

Requests join the running batch as soon as there is a row for them and leave it when they end, each
with an adapter of its own or none, and get the answer they would get alone. Between two decode
steps at most one unit of internalization runs, so neither waits long for the other. Rows, slots and
text are ``answering``'s, jobs ``internalization``'s, where adapters lie ``slots``'; HTTP is another
file's.

Threads: submitting tokenizes and reads adapters in the caller's thread, workers read and resize
videos, and the model runs in one thread alone.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from v2l_fast.errors import V2LError
from v2l_fast.generation import SamplingParams
from v2l_fast.model import Video2LoRA
from v2l_fast.serving.answering import Answering, Waiting
from v2l_fast.serving.background import Background
from v2l_fast.serving.internalization import Internalization, LoadClip
from v2l_fast.serving.requests import (
    EngineClosed,
    Generation,
    GenerationRequest,
    InternalizeJob,
    OtherAdapter,
    PromptTooLong,
    QueueFull,
    told,
)
from v2l_fast.serving.slots import HostAdapters, Store

# Adapters kept in host memory for each slot on the device.
HOST_ADAPTERS_PER_SLOT = 16
# Prompts with a video in context that are prepared at the same time.
WORKERS = 2


@dataclass(frozen=True)
class EngineStats:
    """The engine's state, and its counters since the start.

    Attributes:
        running: requests being answered.
        waiting: requests in the queue.
        jobs: internalization jobs that have not ended.
        requests: ended requests by reason: stop, length, cancelled, error.
        jobs_done, jobs_failed: ended jobs.
        prompt_tokens, completion_tokens, visual_tokens: of all ended requests.
        steps: decode steps.
        adapter_hits, adapter_misses: requests whose adapter was, or was not, in a device slot.
        adapter_loads: adapters read from the store because host memory did not have them either.
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
        warm_up: compile and capture what short questions need before the first one is answered;
            they wait for it.
        load_clip: reads the videos of jobs; ``model.load_clip`` when omitted. It is called with a
            path, the arguments of :meth:`internalize` and the job's :class:`Cancellation`.

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
        warm_up: bool = True,
        load_clip: LoadClip | None = None,
    ) -> None:
        self._model = model
        self._max_context, self._queue_limit = max_context, queue_limit
        self._host = HostAdapters(model, store, HOST_ADAPTERS_PER_SLOT * adapter_slots)
        self._merged = merged
        update = None if merged is None else model.attach(store.get(merged))
        self._answering = Answering(
            model, max_batch, max_context, adapter_slots, update, self._leave
        )

        # Guards what follows; notified whenever any of it changes.
        self._changed = threading.Condition()
        self._queue: deque[Waiting] = deque()
        self._open: set[Generation] = set()
        self._finished = dict.fromkeys(("stop", "length", "cancelled", "error"), 0)
        self._preparing = 0
        self._closing = self._stopped = False

        self._background = Background(self._wake)
        self._jobs = Internalization(
            model, store, self._host, self._background, self._changed, queue_limit,
            load_clip,
        )  # fmt: skip
        self._question_workers = ThreadPoolExecutor(WORKERS, "v2l-question")
        self._ready = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(warm_up,), name="v2l-engine", daemon=True
        )
        self._thread.start()

    # --- for callers ------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether a request would be answered at once, without anything being compiled first."""
        return self._ready.is_set()

    def submit(self, request: GenerationRequest) -> Generation:
        """Queue a question.

        Raises:
            QueueFull: too many are waiting.
            AdapterError: an adapter is unknown or belongs to another model.
            OtherAdapter: one is merged, and something else is asked for.
            PromptTooLong: question and answer limit exceed the context. With a video in context
                that is known later, and raised by the :class:`Generation`.
            EngineClosed: the engine has been closed.
        """
        generation = Generation(request)
        if self._merged is not None and (request.adapters != (self._merged,) or request.clip):
            raise OtherAdapter(
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
        ids = self._model.backbone.prompt_builder.question(request.text)
        self._check_length(len(ids), request.sampling)
        with self._changed:
            self._enter(generation)
            self._queue.append(Waiting(generation, ids, adapter=adapter))
            self._changed.notify_all()
        return generation

    def internalize(
        self,
        path: str | os.PathLike,
        *,
        max_frames: int | None = None,
        longest_edge: int | None = None,
        exact_frames: bool = False,
        sha256: str | None = None,
    ) -> InternalizeJob:
        """Queue a video; arguments as those of :meth:`Video2LoRA.internalize`.

        Args:
            sha256: hash of the file's bytes if it is known; otherwise the file is hashed.

        Raises:
            QueueFull: too many jobs are unfinished.
            EngineClosed: the engine has been closed.
        """
        with self._changed:
            self._check_open()
            return self._jobs.start(path, (max_frames, longest_edge, exact_frames), sha256)

    def cancel(self, job: InternalizeJob) -> bool:
        """End a job as "cancelled", at once; whether it has been. False for a job that has ended,
        or whose adapter is being stored."""
        return self._jobs.cancel(job)

    def forget(self, adapter_id: str) -> None:
        """An adapter has been deleted: the next request for it asks the store."""
        self._host.forget(adapter_id)

    def stats(self) -> EngineStats:
        """Counters of this moment."""
        answering, jobs = self._answering, self._jobs
        with self._changed:
            return EngineStats(
                running=answering.running,
                waiting=len(self._queue) + self._preparing,
                jobs=len(jobs.unfinished),
                requests=dict(self._finished),
                jobs_done=jobs.ended["done"],
                jobs_failed=jobs.ended["failed"],
                prompt_tokens=answering.tokens["prompt"],
                completion_tokens=answering.tokens["completion"],
                visual_tokens=answering.tokens["visual"],
                steps=answering.steps,
                adapter_hits=answering.slots.hits,
                adapter_misses=answering.slots.misses,
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
                    lambda: self._stopped or not (self._open or self._jobs.unfinished), timeout
                )
            self._stopped = True
            self._changed.notify_all()
        self._background.close(reason)
        self._jobs.stop()
        self._question_workers.shutdown(wait=False, cancel_futures=True)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        with self._changed:
            left = list(self._open)
        for generation in left:
            self._fail(generation, reason)
        self._jobs.fail(reason)

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

    def _check_length(self, prompt: int, sampling: SamplingParams) -> None:
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
            steps = self._model.iter_question_prompt(
                request.clip,
                request.text,
                check=lambda tokens: self._check_length(tokens, request.sampling),
            )
            prompt = self._background.run(steps)
        except Exception as error:
            self._fail(generation, told(error))
            with self._changed:
                self._preparing -= 1
            return
        with self._changed:
            self._preparing -= 1
            self._queue.append(Waiting(generation, prompt.embeddings, prompt.visual_tokens))
            self._changed.notify_all()

    # --- in the engine's thread -------------------------------------------------------------------

    def _run(self, warm_up: bool) -> None:
        if warm_up:
            self._guarded(self._answering.warm_up)
        self._ready.set()
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: (
                        self._stopped
                        or self._queue
                        or self._answering.running
                        or len(self._background)
                    )
                )
                if self._stopped:
                    return
            self._guarded(self._turn)
            self._background.step()

    @torch.inference_mode()
    def _guarded(self, work: Callable[[], None]) -> None:
        """An error that belongs to no request ends all that are being answered, not the service."""
        try:
            work()
        except Exception as error:
            reason = told(error)
            for generation in self._answering.abandon():
                self._fail(generation, reason)

    def _turn(self) -> None:
        """Take in what waits, then one more token for all."""
        with self._changed:
            self._answering.take(self._queue)
        self._answering.step()
