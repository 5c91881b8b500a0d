"""Answers in the making: which request has which row and adapter slot, and what each is sent.

All of it belongs to the engine's thread. What a step computes is ``v2l_fast.generation``'s, which
requests there are and when a step is due the engine's.

Requests are taken in the order of the queue, except that one whose adapter finds all slots in use
is skipped: requests behind it that need no new slot go first. After ``PATIENCE`` of them it is
overdue, and no request with an adapter passes it any more, so that slots empty until it has one.
Whatever fails belongs to one request, which ends with the error.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from v2l_fast.generation import ModelRunner, Request, SamplingParams
from v2l_fast.hypernet.adapted_linear import AdapterBank
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.model import Video2LoRA
from v2l_fast.serving.graphs import CudaGraphRunner
from v2l_fast.serving.requests import Generation, Usage, told
from v2l_fast.serving.slots import DeviceAdapterCache, HostAdapter
from v2l_fast.serving.text import TextStream

# Requests that may pass one that waits for a slot.
PATIENCE = 32
# Prompt tokens, padding included, that are taken in between two decode steps; a longer prompt is
# taken in alone.
PREFILL_TOKENS = 4096
# Adapters copied into slots between two decode steps; a wider composition is copied alone.
FILLED_PARTS = 64


@dataclass(eq=False)
class Waiting:
    """A request that can join the batch.

    Attributes:
        prompt: as ids, or embedded [T, D].
        passed: requests behind it that were taken while it waited for a slot.
    """

    generation: Generation
    prompt: Tensor | list[int]
    visual_tokens: int = 0
    adapter: HostAdapter | None = None
    passed: int = 0


@dataclass(eq=False, kw_only=True)
class _Answer(Request):
    """A row of the batch and whose it is."""

    waiting: Waiting
    text: TextStream
    prompt: Tensor | None = None
    first_token: float = 0.0
    seen: int = 0


class Answering:
    """A running batch and its adapters.

    Args:
        rows: requests answered at once.
        context: tokens of prompt and answer together.
        slots: adapters on the device; more of them are moved there when needed.
        merged: an adapter whose update is added to the weights instead.
        leave: called once for each request that ends, with the reason, before its reader hears of
            it; False if it has left already.

    Attributes:
        tokens: of finished requests: prompt, completion, visual.
        steps: decode steps so far.
    """

    def __init__(
        self,
        model: Video2LoRA,
        rows: int,
        context: int,
        slots: int,
        merged: Adapter | None,
        leave: Callable[[Generation, str], bool],
    ) -> None:
        self.tokens = dict.fromkeys(("prompt", "completion", "visual"), 0)
        self.steps = 0
        self.slots = DeviceAdapterCache(model, slots)
        decoder = model.backbone.decoder
        if merged is not None:
            decoder = decoder.merged(merged)
        kind = CudaGraphRunner if decoder.device.type == "cuda" else ModelRunner
        with torch.inference_mode():
            self.batch = kind(decoder, rows, context, model.backbone.stop_ids)
        self._decode = partial(model.backbone.decode, strip=False)
        self._merged = merged is not None
        self._leave = leave
        # Rows on their way into the batch.
        self._joining: list[_Answer] = []

    @property
    def running(self) -> int:
        """Requests being answered."""
        return len(self.batch.requests)

    def warm_up(self) -> None:
        """Compile and capture the passes of short questions, so that no request waits for it.

        Nothing is left of it but the compiled code.
        """
        # One token, or one row, would be a kind of its own to the compiler.
        sizes = [(1, 2), (min(2, self.batch.size), 2)]
        if isinstance(self.batch, CudaGraphRunner):
            sizes = self.batch.captured_sizes()
        for count, length in sizes:
            prompt = self._embedded([0] * length)
            for tables in (None,) if self._merged else (None, self.slots.tables):
                rows = [Request(SamplingParams(max_new_tokens=3)) for _ in range(count)]
                try:
                    self.batch.prefill(rows, [prompt] * count, tables)
                    self.batch.decode(tables)
                finally:
                    self.batch.requests.clear()

    def take(self, queue: deque[Waiting]) -> None:
        """Take out of the queue what can join the batch now; see the module.

        Call with the lock that guards the queue; :meth:`step` does the work.
        """
        if not queue:
            return
        left: list[Waiting] = []
        skipped: list[Waiting] = []
        budget = _Budget(self.batch.free - len(self._joining))
        for waiting in queue:
            if waiting.generation.cancelled:
                self._finish(self._row(waiting), "cancelled")
            elif budget.admits(waiting) and self._admit(waiting, budget, skipped):
                budget.spend(waiting)
            else:
                left.append(waiting)
        queue.clear()
        queue.extend(left)

    def step(self) -> None:
        """Prefill what was taken in, then one more token for all."""
        self._join()
        if self.batch.requests:
            self.batch.decode(self._tables(self.batch.requests))
            self.steps += 1
            self._deliver()

    def abandon(self) -> list[Generation]:
        """Forget all rows, and those about to become one, after an error; whose they were."""
        joining = [row for row in self._joining if row not in self.batch.requests]
        rows = [*self.batch.requests, *joining]
        self._joining.clear()
        for row in rows:
            self._release(row)
        self.batch.clear()
        return [row.waiting.generation for row in rows]

    # --- into the batch ---------------------------------------------------------------------------

    def _row(self, waiting: Waiting) -> _Answer:
        request = waiting.generation.request
        text = TextStream(self._decode, request.stop)
        return _Answer(request.sampling, waiting=waiting, text=text)

    def _admit(self, waiting: Waiting, budget: _Budget, skipped: list[Waiting]) -> bool:
        """Reserve what a request needs; False if it must wait."""
        slot = -1
        if waiting.adapter is not None:
            ids = waiting.generation.request.adapters
            parts = 0 if self.slots.resident(ids) else len(waiting.adapter.parts)
            if budget.overdue or not budget.fills(parts):
                return False
            slot = self.slots.acquire(ids)
            if slot is None:
                skipped.append(waiting)
                budget.overdue |= waiting.passed >= PATIENCE
                return False
        for one in skipped:
            one.passed += 1
            budget.overdue |= one.passed >= PATIENCE
        row = self._row(waiting)
        row.slot = slot
        self._joining.append(row)
        return True

    def _join(self) -> None:
        # A prompt with a video is many times longer: padding others to it would cost more.
        short, groups = [], []
        for row in self._joining:
            try:
                if row.waiting.adapter is not None:
                    self.slots.fill(row.slot, row.waiting.adapter)
                row.prompt = self._embedded(row.waiting.prompt)
            except Exception as error:
                row.fail(error)
                self._finish(row, "error")
                continue
            if row.waiting.visual_tokens:
                groups.append([row])
            else:
                short.append(row)
        for group in [short, *groups] if short else groups:
            self.batch.prefill(group, [row.prompt for row in group], self._tables(group))
            now = time.perf_counter()
            for row in group:
                row.first_token, row.prompt = now, None
        self._joining.clear()
        self._deliver()

    def _tables(self, rows: Sequence[Request]) -> AdapterBank | None:
        """The adapter slots, unless no row has one: the plain model is cheaper."""
        slots = {row.slot for row in rows if row.slot >= 0}
        return self.slots.used(slots) if slots else None

    def _embedded(self, prompt: Tensor | list[int]) -> Tensor:
        if isinstance(prompt, Tensor):
            return prompt
        decoder = self.batch.decoder
        return decoder.embed(torch.tensor(prompt, device=decoder.device))

    # --- out to the readers -----------------------------------------------------------------------

    def _deliver(self) -> None:
        """Send new text, and let go what has ended."""
        for row in self.batch.requests:
            text = ""
            try:
                if len(row.tokens) != row.seen:
                    row.seen = len(row.tokens)
                    text = row.text.push(row.tokens)
            except Exception as error:
                row.fail(error)
            if row.error is None and row.text.stopped:
                row.finish_reason = "stop"
            elif row.finish_reason is None and row.waiting.generation.cancelled:
                row.finish_reason = "cancelled"
            if row.finish_reason is not None:
                self._finish(row, row.finish_reason, text)
            elif text:
                row.waiting.generation.put(text)
        self.batch.retire_finished()

    def _release(self, row: _Answer) -> None:
        if row.slot >= 0:
            self.slots.release(row.slot)
            row.slot = -1

    def _finish(self, row: _Answer, reason: str, text: str = "") -> None:
        waiting = row.waiting
        generation = waiting.generation
        self._release(row)
        try:
            text += row.text.finish(row.tokens)
        except Exception as error:
            row.fail(row.error or error)
        if row.error is not None:
            if self._leave(generation, "error"):
                generation.fail(told(row.error))
            return
        first = row.first_token - generation.submitted if row.first_token else 0.0
        usage = Usage(len(waiting.prompt), len(row.tokens), waiting.visual_tokens, first)
        self.tokens["prompt"] += usage.prompt_tokens
        self.tokens["completion"] += usage.completion_tokens
        self.tokens["visual"] += usage.visual_tokens
        if self._leave(generation, reason):
            generation.finish(text, reason, usage)


class _Budget:
    """What may be taken in between two decode steps, in rows, prompt tokens and adapters.

    Attributes:
        overdue: a request that is overdue waits for a slot.
    """

    def __init__(self, rows: int) -> None:
        self.overdue = False
        self._rows = rows
        self._count = self._longest = self._parts = 0

    def admits(self, waiting: Waiting) -> bool:
        """Whether there is room for it; nothing behind the first prompt that is too long is
        taken."""
        longest = max(self._longest, len(waiting.prompt))
        if self._count and (self._count + 1) * longest > PREFILL_TOKENS:
            self._rows = 0
        return self._rows > 0

    def spend(self, waiting: Waiting) -> None:
        """It has been taken."""
        self._rows -= 1
        self._count += 1
        self._longest = max(self._longest, len(waiting.prompt))

    def fills(self, parts: int) -> bool:
        """Whether so many adapters can be copied, which are then counted."""
        if parts and self._parts and self._parts + parts > FILLED_PARTS:
            return False
        self._parts += parts
        return True
