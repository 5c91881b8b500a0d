"""Answers in the making: which request has which row and adapter slot, and what each is sent.

All of it belongs to the engine's thread. What a step computes is ``v2l_fast.generation``'s, which
requests there are and when a step is due the engine's.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from v2l_fast.adapted import AdapterSlots
from v2l_fast.adapter import Adapter
from v2l_fast.generation import Batch, Row, Sampling
from v2l_fast.model import Video2LoRA
from v2l_fast.serving.graphs import GraphBatch
from v2l_fast.serving.requests import Generation, Usage
from v2l_fast.serving.slots import DeviceSlots
from v2l_fast.serving.text import TextStream


@dataclass(frozen=True)
class Waiting:
    """A request that can join the batch: its prompt as ids, or embedded [T, D]."""

    generation: Generation
    prompt: Tensor | list[int]
    visual_tokens: int = 0
    adapter: Adapter | None = None


@dataclass(eq=False, kw_only=True)
class _Answer(Row):
    """A row of the batch and whose it is."""

    waiting: Waiting
    text: TextStream
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
        self.slots = DeviceSlots(model, slots)
        decoder = model.backbone.decoder
        if merged is not None:
            decoder = decoder.merged(merged)
        kind = GraphBatch if decoder.device.type == "cuda" else Batch
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
        return len(self.batch.rows)

    def warm_up(self) -> None:
        """Compile and capture the passes of short questions, so that no request waits for it.

        Nothing is left of it but the compiled code.
        """
        # One token, or one row, would be a kind of its own to the compiler.
        sizes = [(1, 2), (min(2, self.batch.size), 2)]
        if isinstance(self.batch, GraphBatch):
            sizes = self.batch.captured_sizes()
        for count, length in sizes:
            prompt = self._embedded([0] * length)
            for tables in (None,) if self._merged else (None, self.slots.tables):
                rows = [Row(Sampling(max_new_tokens=3)) for _ in range(count)]
                try:
                    self.batch.join(rows, [prompt] * count, tables)
                    self.batch.step(tables)
                finally:
                    self.batch.rows.clear()

    def take(self, queue: deque[Waiting]) -> None:
        """Take out of the queue what has waited longest, while there are rows and slots for it.

        Call with the lock that guards the queue; :meth:`step` does the work.
        """
        for waiting in [w for w in queue if w.generation.cancelled]:
            queue.remove(waiting)
            self._finish(self._row(waiting), "cancelled")
        while queue and len(self._joining) < self.batch.free:
            row = self._row(queue.popleft())
            self._joining.append(row)
            if not self._place(row):
                queue.appendleft(self._joining.pop().waiting)
                break

    def step(self) -> None:
        """Prefill what was taken in, then one more token for all."""
        self._join()
        if self.batch.rows:
            self.batch.step(self._tables(self.batch.rows))
            self.steps += 1
            self._deliver()

    def abandon(self) -> list[Generation]:
        """Forget all rows, and those about to become one, after an error; whose they were."""
        joining = [row for row in self._joining if row not in self.batch.rows]
        rows = [*self.batch.rows, *joining]
        for row in rows:
            if row.slot >= 0:
                self.slots.release(row.slot)
        self.batch.rows.clear()
        self._joining.clear()
        return [row.waiting.generation for row in rows]

    # --- into the batch ---------------------------------------------------------------------------

    def _row(self, waiting: Waiting) -> _Answer:
        request = waiting.generation.request
        text = TextStream(self._decode, request.stop)
        return _Answer(request.sampling, waiting=waiting, text=text)

    def _place(self, row: _Answer) -> bool:
        """Give a row its adapter's slot; False when all are in use."""
        waiting = row.waiting
        if waiting.adapter is not None:
            slot = self.slots.acquire(waiting.generation.request.adapters, waiting.adapter)
            if slot is None:
                return False
            row.slot = slot
        return True

    def _join(self) -> None:
        # A prompt with a video is many times longer: padding others to it would cost more.
        short = [row for row in self._joining if not row.waiting.visual_tokens]
        long = [[row] for row in self._joining if row.waiting.visual_tokens]
        for group in [short, *long] if short else long:
            prompts = [self._embedded(row.waiting.prompt) for row in group]
            self.batch.join(group, prompts, self._tables(group))
            now = time.perf_counter()
            for row in group:
                row.first_token = now
        self._joining.clear()
        self._deliver()

    def _tables(self, rows: Sequence[Row]) -> AdapterSlots | None:
        """The adapter slots, unless no row has one: the plain model is cheaper."""
        return self.slots.tables if any(row.slot >= 0 for row in rows) else None

    def _embedded(self, prompt: Tensor | list[int]) -> Tensor:
        if isinstance(prompt, Tensor):
            return prompt
        decoder = self.batch.decoder
        return decoder.embed(torch.tensor(prompt, device=decoder.device))

    # --- out to the readers -----------------------------------------------------------------------

    def _deliver(self) -> None:
        """Send new text, and let go what has ended."""
        for row in self.batch.rows:
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
        self.batch.drop_finished()

    def _finish(self, row: _Answer, reason: str, text: str = "") -> None:
        waiting = row.waiting
        generation = waiting.generation
        first = row.first_token - generation.submitted if row.first_token else 0.0
        usage = Usage(len(waiting.prompt), len(row.tokens), waiting.visual_tokens, first)
        if row.slot >= 0:
            self.slots.release(row.slot)
        self.tokens["prompt"] += usage.prompt_tokens
        self.tokens["completion"] += usage.completion_tokens
        self.tokens["visual"] += usage.visual_tokens
        if self._leave(generation, reason):
            generation.finish(text + row.text.finish(row.tokens), reason, usage)
