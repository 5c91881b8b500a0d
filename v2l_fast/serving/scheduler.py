"""Schedules waiting requests into the running batch, and delivers their answers.

Runs in the engine's thread. :class:`~v2l_fast.generation.ModelRunner` computes the passes; the
engine decides when a step is due.

Requests are scheduled in the order of the queue, except that one whose adapter finds every slot in
use is skipped: later requests that need no new slot go first. After ``PATIENCE`` of them it is
overdue, and no request with an adapter passes it any more, so that slots become free for it. An
error belongs to one request, which ends with it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from v2l_fast.generation import ModelRunner, PrefixCache, Request, SamplingParams
from v2l_fast.generation.sampling import on_device
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.hypernet.adapter_bank import AdapterBank
from v2l_fast.model import Video2LoRA
from v2l_fast.serving.device_cache import DeviceAdapterCache
from v2l_fast.serving.graphs import CudaGraphRunner
from v2l_fast.serving.request import StreamingRequest, TextStream, Usage, user_facing_error

# Requests that may pass one that waits for a slot.
PATIENCE = 32
# Prompt tokens, padding included, prefilled between two decode steps; a longer prompt is prefilled
# alone.
PREFILL_TOKENS = 4096
# Adapters copied into slots between two decode steps; a larger composition is copied alone.
COPIED_PARTS = 64


class Scheduler:
    """The running batch and its adapters.

    Args:
        max_batch: requests answered at once.
        max_context: tokens of prompt and answer together.
        adapter_slots: adapters on the device; others are copied there when they are needed.
        merged: an adapter whose update is added to the weights instead.
        prefix_cache: keys and values of earlier prompts and answers.
        on_end: called once for each request that ends, with the reason, before its reader is
            notified; returns False if the request has ended already.

    Attributes:
        tokens: of ended requests: prompt, completion, visual, reused.
        steps: decode steps so far.
        adapters: the adapters on the device.
        runner: the running batch.
    """

    def __init__(
        self,
        model: Video2LoRA,
        max_batch: int,
        max_context: int,
        adapter_slots: int,
        merged: Adapter | None,
        prefix_cache: PrefixCache,
        on_end: Callable[[StreamingRequest, str], bool],
    ) -> None:
        self.tokens = dict.fromkeys(("prompt", "completion", "visual", "reused"), 0)
        self.steps = 0
        self.adapters = DeviceAdapterCache(model, adapter_slots)
        decoder = model.backbone.decoder
        if merged is not None:
            decoder = decoder.merged(merged)
        runner_class = CudaGraphRunner if decoder.device.type == "cuda" else ModelRunner
        with torch.inference_mode():
            self.runner = runner_class(
                decoder, max_batch, max_context, model.backbone.stop_ids, prefix_cache=prefix_cache
            )
        self.prefix_cache = prefix_cache
        self._decode_text = partial(model.backbone.decode, strip=False)
        self._merged = merged is not None
        self._on_end = on_end
        # Scheduled, but not prefilled.
        self._scheduled: list[StreamingRequest] = []

    @property
    def num_running(self) -> int:
        """Requests being answered."""
        return len(self.runner.requests)

    def warm_up(self) -> None:
        """Compile and capture the passes of short questions, so that no request waits for it."""
        # The compiler specializes on sizes of 1.
        sizes = [(1, 2), (min(2, self.runner.size), 2)]
        if isinstance(self.runner, CudaGraphRunner):
            sizes = self.runner.captured_sizes()
        banks = (None,) if self._merged else (None, self.adapters.bank)
        for bank in banks if self.prefix_cache.max_bytes else ():
            self._warm_up_continuations(bank)
        for count, length in sizes:
            prompt = self._embed([0] * length)
            for bank in banks:
                requests = [Request(SamplingParams(max_new_tokens=3)) for _ in range(count)]
                try:
                    # Objects of their own: equal ones would be computed once.
                    self.runner.prefill(requests, [prompt.clone() for _ in requests], bank)
                    self.runner.decode(bank)
                finally:
                    self.runner.requests.clear()
        if isinstance(self.runner, CudaGraphRunner):
            for bank in banks:
                self.runner.capture_long(bank)

    def _warm_up_continuations(self, bank: AdapterBank | None) -> None:
        sizes = [(1, 2), (min(2, self.runner.size), 2)]
        if isinstance(self.runner, CudaGraphRunner):
            sizes += [(1, length) for length in self.runner.captured_continuations()]
        device = self.runner.decoder.device
        for count, length in sizes:
            embeddings = self._embed([0] * length).expand(count, -1, -1)
            zeros = torch.zeros(count, dtype=torch.long, device=device)
            rows = torch.arange(count, device=device)
            self.runner.run_continuation(embeddings, rows, zeros, zeros, length, bank)

    def schedule(self, waiting: deque[StreamingRequest]) -> None:
        """Move the requests that can join the batch now out of the queue; see the module.

        Call with the queue's lock held; :meth:`step` does the work.
        """
        if not waiting:
            return
        remaining: list[StreamingRequest] = []
        skipped: list[StreamingRequest] = []
        budget = _StepBudget(self.runner.free - len(self._scheduled))
        for request in waiting:
            if request.cancelled:
                self._end(request, "cancelled")
            elif budget.has_room(request) and self._reserve(request, budget, skipped):
                budget.spend(request)
                request.text_stream = TextStream(self._decode_text, request.stop)
                self._scheduled.append(request)
            else:
                remaining.append(request)
        waiting.clear()
        waiting.extend(remaining)

    def step(self) -> None:
        """Prefill the scheduled requests, then decode one more token for all."""
        self._prefill()
        if self.runner.requests:
            self.runner.decode(self._bank(self.runner.requests))
            self.steps += 1
            self._deliver()

    def drop_all(self) -> list[StreamingRequest]:
        """Forget all scheduled and running requests after an error, and return them."""
        running: list[StreamingRequest] = list(self.runner.requests)
        requests = running + [r for r in self._scheduled if r not in running]
        self._scheduled.clear()
        for request in requests:
            self._release(request)
        self.runner.clear()
        return requests

    # --- into the batch ---------------------------------------------------------------------------

    def _reserve(
        self, request: StreamingRequest, budget: _StepBudget, skipped: list[StreamingRequest]
    ) -> bool:
        """Reserve an adapter slot if the request needs one; False if it must wait."""
        if request.host_adapter is not None:
            resident = self.adapters.is_resident(request.adapters)
            parts = 0 if resident else len(request.host_adapter.parts)
            if budget.overdue or not budget.may_copy(parts):
                return False
            slot = self.adapters.acquire(request.adapters)
            if slot is None:
                skipped.append(request)
                budget.overdue |= request.skipped >= PATIENCE
                return False
            request.slot = slot
        for earlier in skipped:
            earlier.skipped += 1
            budget.overdue |= earlier.skipped >= PATIENCE
        return True

    def _prefill(self) -> None:
        # A prompt with a video is many times longer: padding others to it would cost more.
        short, embedded = [], {}
        # Prompts that several requests share stay one object, which the runner computes once.
        prompts: dict[int, tuple[object, Tensor]] = {}
        videos: dict[int, list[StreamingRequest]] = {}
        for request in self._scheduled:
            try:
                if request.host_adapter is not None:
                    self.adapters.fill(request.slot, request.host_adapter)
                key = id(request.prompt)
                if key not in prompts:
                    # The id is not used again while the prompt is kept.
                    prompts[key] = request.prompt, self._embed(request.prompt)
                embedded[request] = prompts[key][1]
            except Exception as error:
                request.fail(error)
                self._end(request, "error")
                continue
            request.prompt = request.host_adapter = None
            if request.visual_tokens and request.prefix is None:
                videos.setdefault(key, []).append(request)
            else:
                short.append(request)
        prompts.clear()
        for group in [short, *videos.values()] if short else list(videos.values()):
            prompts_of_group = [embedded.pop(request) for request in group]
            self.runner.prefill(group, prompts_of_group, self._bank(group))
            now = time.perf_counter()
            for request in group:
                request.first_token = now
                self._release_prefix(request)
        self._scheduled.clear()
        self._deliver()

    def _bank(self, requests: Sequence[Request]) -> AdapterBank | None:
        """The adapter slots, or None if no request uses one: the plain model is cheaper."""
        slots = {request.slot for request in requests if request.slot >= 0}
        return self.adapters.bank_for(slots) if slots else None

    def _embed(self, prompt: Tensor | list[int]) -> Tensor:
        if isinstance(prompt, Tensor):
            return prompt
        decoder = self.runner.decoder
        return decoder.embed(on_device(prompt, torch.long, decoder.device))

    # --- out to the readers -----------------------------------------------------------------------

    def _deliver(self) -> None:
        """Send new text, and retire the requests that have ended."""
        for request in self.runner.requests:
            text = ""
            try:
                text = request.text_stream.push(request.tokens)
            except Exception as error:
                request.fail(error)
            if request.error is None and request.text_stream.stopped:
                request.finish_reason = "stop"
            elif request.finish_reason is None and request.cancelled:
                request.finish_reason = "cancelled"
            if request.finish_reason is not None:
                self._end(request, request.finish_reason, text)
            elif text:
                request.deliver(text)
        self.runner.retire_finished()

    def _release_prefix(self, request: StreamingRequest) -> None:
        if request.prefix is not None:
            self.prefix_cache.release(request.prefix)
            request.prefix = None

    def _release(self, request: StreamingRequest) -> None:
        self._release_prefix(request)
        if request.slot >= 0:
            self.adapters.release(request.slot)
            request.slot = -1

    def _end(self, request: StreamingRequest, reason: str, text: str = "") -> None:
        self._release(request)
        try:
            if request.text_stream is not None:
                text += request.text_stream.finish(request.tokens)
        except Exception as error:
            request.fail(request.error or error)
        if request.error is not None:
            if self._on_end(request, "error"):
                request.abort(user_facing_error(request.error))
            return
        first = request.first_token - request.submitted if request.first_token else 0.0
        usage = Usage(
            request.prompt_tokens, len(request.tokens), request.visual_tokens, first, request.reused
        )
        self.tokens["prompt"] += usage.prompt_tokens
        self.tokens["completion"] += usage.completion_tokens
        self.tokens["visual"] += usage.visual_tokens
        self.tokens["reused"] += usage.reused_tokens
        if self._on_end(request, reason):
            request.complete(text, reason, usage)


class _StepBudget:
    """What may be scheduled between two decode steps: rows, prompt tokens and adapter copies.

    Attributes:
        overdue: whether an overdue request waits for a slot.
    """

    def __init__(self, rows: int) -> None:
        self.overdue = False
        self._rows = rows
        self._count = self._longest = self._parts = 0
        self._prompt: object = None

    def has_room(self, request: StreamingRequest) -> bool:
        """Whether there is room for it; False for all that follow a prompt that is too long."""
        if request.prompt is not self._prompt:
            longest = max(self._longest, request.prompt_tokens)
            if self._count and (self._count + 1) * longest > PREFILL_TOKENS:
                self._rows = 0
        return self._rows > 0

    def spend(self, request: StreamingRequest) -> None:
        """The request is scheduled."""
        self._rows -= 1
        # A prompt is computed once for the requests that share it.
        self._count += request.prompt is not self._prompt
        self._prompt = request.prompt
        self._longest = max(self._longest, request.prompt_tokens)

    def may_copy(self, parts: int) -> bool:
        """Whether ``parts`` more adapters can be copied; counts them if so."""
        if parts and self._parts and self._parts + parts > COPIED_PARTS:
            return False
        self._parts += parts
        return True
