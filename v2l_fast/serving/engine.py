"""The serving engine: one thread that answers many requests at once and internalizes videos.

Requests join the running batch when a row is free and leave it when they end, each with an adapter
of its own or none, and get the answer they would get alone. Between two decode steps at most one
unit of internalization runs. ``scheduler`` handles rows and slots, ``internalize`` jobs, and
``device_cache`` adapters on the device; this module knows nothing of HTTP.

Threads: a caller's thread tokenizes and reads adapters when it submits, worker threads read and
resize videos, and the model runs in the engine's thread only.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from v2l_fast.errors import ConfigError, PromptTooLong, V2LError
from v2l_fast.generation import CacheKey, PrefixCache
from v2l_fast.model import Video2LoRA
from v2l_fast.serving.device_cache import HostAdapterCache, Store
from v2l_fast.serving.internalize import InternalizeJob, Internalizer, LoadClip, TaskInterleaver
from v2l_fast.serving.request import (
    EngineClosed,
    OtherAdapter,
    QueueFull,
    StreamingRequest,
    user_facing_error,
)
from v2l_fast.serving.scheduler import Scheduler
from v2l_fast.video import Clip, FrameSampling
from v2l_fast.vlm.base import video_prompt_ids
from v2l_fast.work_units import run_to_completion

# Adapters kept in host memory for each slot on the device.
HOST_ADAPTERS_PER_SLOT = 16
# Keys and values of about 13,000 tokens of SmolVLM2-500M in bfloat16.
PREFIX_CACHE_BYTES = 1 << 29
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
        prompt_tokens, completion_tokens, visual_tokens, reused_tokens: of all ended requests.
        steps: decode steps.
        adapter_hits, adapter_misses: requests whose adapter was, or was not, in a device slot.
        adapter_loads: adapters read from the store because host memory did not have them either.
        adapter_slots: adapters that fit on the device.
        resident_adapters, waiting_adapters: ids on the device, and of requests in the queue.
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
    reused_tokens: int
    steps: int
    adapter_hits: int
    adapter_misses: int
    adapter_loads: int
    adapter_slots: int
    resident_adapters: tuple[str, ...]
    waiting_adapters: tuple[str, ...]


class Engine:
    """Answers and internalizes until it is closed.

    Args:
        model: not changed; other code can use it at the same time.
        store: adapters are read from it, and internalized ones written to it.
        max_batch: requests answered at once.
        max_context: tokens of prompt and answer together.
        adapter_slots: adapters on the device; others are copied there when they are needed.
        queue_limit: requests that may wait for a row, and jobs that may be unfinished.
        merged: id of an adapter whose update is added to the weights. Its answers cost what the
            plain model's do, and the engine answers from this adapter only.
        warm_up: compile and capture what short questions need before the first one is answered.
        prefix_cache_bytes: of keys and values of earlier prompts and answers, which requests that
            begin the same way reuse; 0 for none.
        load_clip: reads the videos of jobs, as :data:`~v2l_fast.serving.internalize.LoadClip`;
            :meth:`Video2LoRA.load_clip` if omitted.

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
        prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
        load_clip: LoadClip | None = None,
    ) -> None:
        self._model = model
        self._max_context, self._queue_limit = max_context, queue_limit
        self._host_adapters = HostAdapterCache(model, store, HOST_ADAPTERS_PER_SLOT * adapter_slots)
        self._merged = merged
        update = None if merged is None else model.attach(store.get(merged))
        self._prefix_cache = PrefixCache(prefix_cache_bytes)
        self._scheduler = Scheduler(
            model, max_batch, max_context, adapter_slots, update, self._prefix_cache,
            self._end_request,
        )  # fmt: skip

        # Guards what follows; notified when any of it changes.
        self._changed = threading.Condition()
        self._waiting: deque[StreamingRequest] = deque()
        self._unfinished: set[StreamingRequest] = set()
        self._ended = dict.fromkeys(("stop", "length", "cancelled", "error"), 0)
        self._preparing = 0
        self._closing = self._stopped = False

        self._interleaver = TaskInterleaver(self._wake)
        self._jobs = Internalizer(
            model, store, self._host_adapters, self._interleaver, self._changed, queue_limit,
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
    def max_context(self) -> int:
        """Tokens of prompt and answer together."""
        return self._max_context

    @property
    def ready(self) -> bool:
        """Whether warm-up is over, so that a request is answered without compiling first."""
        return self._ready.is_set()

    def submit(self, request: StreamingRequest) -> StreamingRequest:
        """Queue a request for one answer, and return it.

        Raises:
            QueueFull: too many requests are waiting.
            AdapterError: an adapter is unknown or belongs to another model.
            OtherAdapter: an adapter is merged, and the request is for something else.
            PromptTooLong: the question and the limit of new tokens exceed the context. With a video
                in context, reading the answer raises it instead.
            EngineClosed: the engine has been closed.
            ConfigError: the request has been submitted before, or asks for several answers.
        """
        if request.submitted is not None:
            raise ConfigError("the request has been submitted before; submit request.copy()")
        if request.sampling.n > 1:
            raise ConfigError(f"n must be 1, got {request.sampling.n}; use submit_all")
        self._submit([request])
        return request

    def submit_all(self, request: StreamingRequest) -> list[StreamingRequest]:
        """Queue one request for each of the ``n`` answers that ``request`` asks for.

        The prompt is prepared once, and requests that find free rows at the same time share its
        prefill. Request i uses ``seed + i``. All are queued, or none.

        Raises:
            As :meth:`submit`.
        """
        sampling = request.sampling
        requests = [request.copy(sampling.for_example(i)) for i in range(sampling.n)]
        self._submit(requests)
        return requests

    def _submit(self, requests: list[StreamingRequest]) -> None:
        request, *others = requests
        if self._merged is not None and (request.adapters != (self._merged,) or request.clip):
            raise OtherAdapter(
                f"this engine answers from adapter {self._merged} only, merged into the weights; "
                "start one without merged= for other adapters, none, or a video in context"
            )
        start = time.perf_counter()
        self._check_queue(len(requests))
        for one in requests:
            if one.new_constraint is not None:
                one.constraint = one.new_constraint()
        if request.clip is not None:
            with self._changed:
                self._add(requests, start)
                self._preparing += len(requests)
            self._question_workers.submit(self._prepare, requests)
            return
        if request.adapters and self._merged is None:
            request.host_adapter = self._host_adapters.get(request.adapters)
        request.prompt = self._model.backbone.prompt_builder.question(request.question)
        self._check_length(requests, len(request.prompt))
        if not request.private:
            content = None if request.host_adapter is None else request.host_adapter.content
            request.cache_key = CacheKey(request.prompt, content)
        for one in others:
            one.prompt, one.host_adapter = request.prompt, request.host_adapter
            one.cache_key = request.cache_key
        with self._changed:
            self._add(requests, start)
            self._waiting.extend(requests)
            self._changed.notify_all()

    def internalize(
        self,
        path: str | os.PathLike,
        sampling: FrameSampling | None = None,
        sha256: str | None = None,
    ) -> InternalizeJob:
        """Queue a video.

        Args:
            sampling: frames and size; as in training by default.
            sha256: hash of the file's bytes if it is known; otherwise the file is hashed.

        Raises:
            QueueFull: too many jobs are unfinished.
            EngineClosed: the engine has been closed.
        """
        with self._changed:
            self._check_open()
            return self._jobs.start(path, sampling or self._model.config.sampling, sha256)

    def cancel(self, job: InternalizeJob) -> bool:
        """End a job as "cancelled", at once.

        Returns:
            False if the job has ended or is storing its adapter.
        """
        return self._jobs.cancel(job)

    def forget(self, adapter_id: str) -> None:
        """Forget a deleted adapter: the next request for it asks the store."""
        self._host_adapters.forget(adapter_id)

    def stats(self) -> EngineStats:
        """The current state and counters."""
        scheduler, jobs = self._scheduler, self._jobs
        with self._changed:
            return EngineStats(
                running=scheduler.num_running,
                waiting=len(self._waiting) + self._preparing,
                jobs=len(jobs.unfinished),
                requests=dict(self._ended),
                jobs_done=jobs.ended["done"],
                jobs_failed=jobs.ended["failed"],
                prompt_tokens=scheduler.tokens["prompt"],
                completion_tokens=scheduler.tokens["completion"],
                visual_tokens=scheduler.tokens["visual"],
                reused_tokens=scheduler.tokens["reused"],
                steps=scheduler.steps,
                adapter_hits=scheduler.adapters.hits,
                adapter_misses=scheduler.adapters.misses,
                adapter_loads=self._host_adapters.loads,
                adapter_slots=scheduler.adapters.count,
                resident_adapters=scheduler.adapters.resident,
                waiting_adapters=_distinct(request.adapters for request in self._waiting),
            )

    def close(self, drain: bool = True, timeout: float = 30.0) -> None:
        """Accept no more work; with ``drain``, give unfinished work ``timeout`` seconds to finish.

        The rest ends with EngineClosed. Closing twice has no effect.
        """
        reason = EngineClosed("the server is shutting down; try again later")
        with self._changed:
            self._closing = True
            if drain:
                self._changed.wait_for(
                    lambda: self._stopped or not (self._unfinished or self._jobs.unfinished),
                    timeout,
                )
            self._stopped = True
            self._changed.notify_all()
        self._interleaver.close(reason)
        self._jobs.shut_down()
        self._question_workers.shutdown(wait=False, cancel_futures=True)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        with self._changed:
            unfinished = list(self._unfinished)
        for request in unfinished:
            self._fail(request, reason)
        self._jobs.fail_all(reason)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- bookkeeping ------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closing:
            raise EngineClosed("the server is shutting down; try again later")

    def _check_queue(self, count: int) -> None:
        self._check_open()
        waiting = len(self._waiting) + self._preparing
        if waiting + count > self._queue_limit:
            raise QueueFull(f"{waiting} questions are waiting; try again later")

    def _check_length(self, requests: list[StreamingRequest], prompt_tokens: int) -> None:
        new_tokens = requests[0].sampling.max_new_tokens
        if prompt_tokens + new_tokens > self._max_context:
            raise PromptTooLong(
                f"a prompt of {prompt_tokens} tokens and up to {new_tokens} new tokens exceed the "
                f"context of {self._max_context}; drop the oldest messages, shorten the question "
                "or lower the limit of new tokens"
            )
        for request in requests:
            request.prompt_tokens = prompt_tokens

    def _add(self, requests: list[StreamingRequest], submitted: float) -> None:
        """Count requests in; call with the lock held."""
        self._check_queue(len(requests))
        for request in requests:
            request.submitted = submitted
        self._unfinished.update(requests)

    def _end_request(self, request: StreamingRequest, reason: str) -> bool:
        """Count a request out; False if it has ended already."""
        with self._changed:
            if request not in self._unfinished:
                return False
            self._unfinished.discard(request)
            self._ended[reason] += 1
            self._changed.notify_all()
        return True

    def _fail(self, request: StreamingRequest, error: V2LError) -> None:
        if self._end_request(request, "error"):
            request.abort(error)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # --- in the workers ---------------------------------------------------------------------------

    def _prepare(self, requests: list[StreamingRequest]) -> None:
        """Compute the prompt of a question with its video in context.

        If the prefix cache holds the whole video, only the text is computed.
        """
        first = requests[0]
        try:
            key = self._context_key(first)
            self._check_length(requests, len(key.tokens))
            prefix = None
            if not first.private:
                prefix = self._prefix_cache.acquire(self._scheduler.runner.scoped(key))
            image_token = self._model.backbone.image_token_id
            if prefix is not None and image_token in key.tokens[prefix.length :]:
                self._prefix_cache.release(prefix)
                prefix = None
            prompt: Tensor | list[int]
            if prefix is None:
                units = self._model.iter_question_prompt(first.clip, first.question)
                prompt = self._interleaver.run(units).embeddings
            else:
                prompt = list(key.tokens[prefix.length :])
        except Exception as error:
            for request in requests:
                self._fail(request, user_facing_error(error))
            with self._changed:
                self._preparing -= len(requests)
            return
        for index, request in enumerate(requests):
            request.prompt, request.cache_key = prompt, None if first.private else key
            request.visual_tokens = key.tokens.count(image_token)
            if prefix is not None:
                request.prefix = self._prefix_cache.retain(prefix) if index else prefix
        with self._changed:
            self._preparing -= len(requests)
            self._waiting.extend(requests)
            self._changed.notify_all()

    def _context_key(self, request: StreamingRequest) -> CacheKey:
        """Token ids of a prompt with its video, and the hash of the frames."""
        clip, edge = request.clip, self._model.config.sampling.longest_edge
        builder = self._model.backbone.prompt_builder
        ids = video_prompt_ids(builder, clip, request.question, edge, answer_follows=True)
        frames = clip.frames.cpu().contiguous()
        pixels = hashlib.sha256(f"{list(frames.shape)}".encode())
        pixels.update(frames.numpy().data)
        return CacheKey(ids, pixels.hexdigest())

    # --- in the engine's thread -------------------------------------------------------------------

    def _run(self, warm_up: bool) -> None:
        device = self._model.backbone.decoder.device
        if device.type == "cuda":
            # Graphs and streams belong to the thread's current device.
            torch.cuda.set_device(device)
        if warm_up:
            self._guard(self._scheduler.warm_up)
            self._guard(self._warm_up_videos)
        self._ready.set()
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: (
                        self._stopped
                        or self._waiting
                        or self._scheduler.num_running
                        or len(self._interleaver)
                    )
                )
                if self._stopped:
                    return
            self._guard(self._step)
            self._interleaver.run_unit()

    def _warm_up_videos(self) -> None:
        """Compile the passes of internalizing, so that the first job does not delay answers."""
        if not self._model.backbone.decoder.is_compiled:
            return
        edge = self._model.config.longest_edge
        clip = Clip.from_frames(torch.zeros(2, 3, edge * 3 // 4, edge, dtype=torch.uint8), fps=1.0)
        # As jobs run: the compiler has graphs of their own for tensors of inference mode.
        with torch.inference_mode(False):
            run_to_completion(self._model.iter_internalize(clip))

    @torch.inference_mode()
    def _guard(self, work: Callable[[], None]) -> None:
        """Run ``work``; an error that belongs to no request ends all running ones."""
        try:
            work()
        except Exception as error:
            reason = user_facing_error(error)
            for request in self._scheduler.drop_all():
                self._fail(request, reason)

    def _step(self) -> None:
        """Schedule waiting requests, then decode one more token for all."""
        with self._changed:
            self._scheduler.schedule(self._waiting)
        self._scheduler.step()


def _distinct(groups: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(id for group in groups for id in group))
