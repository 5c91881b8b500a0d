"""A model runner whose passes are replayed CUDA graphs.

Launching a decode step from Python takes longer than computing it. A step is captured once for each
number of rows (a power of two), reach of the attention (a power of two) and adapter bank. A prefill
is captured for a single short prompt, and for the rest of a prompt whose beginning is cached: the
common cases of a first token. Everything that changes is in tensors that keep their addresses.
:class:`ModelRunner` alone defines what a pass computes.

A pass whose capture fails runs without a graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from v2l_fast.generation.prefix_cache import PrefixCache
from v2l_fast.generation.runner import ModelRunner
from v2l_fast.hypernet.adapter_bank import AdapterBank
from v2l_fast.vlm.decoder import Decoder

log = logging.getLogger(__name__)

MIN_REACH = 256
MIN_PROMPT, MAX_PROMPT = 16, 128


# Compared by identity: comparing tensors does not give a bool.
@dataclass(frozen=True, eq=False)
class _CapturedPass:
    """A graph, its inputs and its output; holds the bank so that its id is not reused."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor
    adapters: AdapterBank | None


class CudaGraphRunner(ModelRunner):
    """A :class:`ModelRunner`, with its arguments, that replays CUDA graphs (see the module)."""

    def __init__(
        self,
        decoder: Decoder,
        size: int,
        context: int,
        stop_ids: Sequence[int],
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        super().__init__(decoder, size, context, stop_ids, prefix_cache=prefix_cache)
        # None if the capture of the pass failed.
        self._graphs: dict[tuple, _CapturedPass | None] = {}
        self._pool: tuple[int, int] | None = None

    def captured_sizes(self) -> list[tuple[int, int]]:
        """(rows, prompt tokens) of batches that together capture every pass up to MIN_REACH."""
        counts = {min(_next_power_of_two(n), self.size) for n in range(1, self.size + 1)}
        sizes = [(count, 2) for count in sorted(counts)]
        length = MIN_PROMPT
        while length <= min(MAX_PROMPT, self.cache.capacity):
            # One token less leaves room for the decode step that follows.
            sizes.append((1, length - 1))
            length *= 2
        return sizes

    def capture_long(self, adapters: AdapterBank | None) -> None:
        """Capture the decode steps that reach further than MIN_REACH; no request may run."""
        self._positions.zero_()
        reach = 2 * MIN_REACH
        while reach < 2 * self.cache.capacity:
            for count in {min(_next_power_of_two(n), self.size) for n in range(1, self.size + 1)}:
                self.run_decode(count, min(reach, self.cache.capacity), adapters)
            reach *= 2

    def captured_continuations(self) -> list[int]:
        """Tokens of single continuations that together capture every length up to MIN_REACH."""
        lengths = [MIN_PROMPT]
        while 2 * lengths[-1] <= MAX_PROMPT:
            lengths.append(2 * lengths[-1])
        return [length for length in lengths if length <= self.cache.capacity]

    def run_decode(self, count: int, limit: int, adapters: AdapterBank | None) -> Tensor:
        rows = min(_next_power_of_two(count), self.size)
        reach = min(max(_next_power_of_two(limit), MIN_REACH), self.cache.capacity)
        # Free rows compute a token at position 0 without an adapter.
        self._positions[count:rows] = 0
        self._slots[count:rows] = -1
        key = ("decode", rows, reach, id(adapters))
        run = super().run_decode

        def capture() -> _CapturedPass:
            return self._capture(lambda: run(rows, reach, adapters), (), adapters)

        captured = self._captured(key, capture)
        if captured is None:
            return run(count, limit, adapters)
        captured.graph.replay()
        return captured.output[:count]

    def run_prefill(
        self, embeddings: Tensor, rows: Tensor, last: Tensor, adapters: AdapterBank | None
    ) -> Tensor:
        run = super().run_prefill
        count, longest, width = embeddings.shape
        length = max(_next_power_of_two(longest), MIN_PROMPT)
        if count > 1 or length > min(MAX_PROMPT, self.cache.capacity):
            return run(embeddings, rows, last, adapters)
        key = ("prefill", length, id(adapters))

        def capture() -> _CapturedPass:
            inputs = (embeddings.new_zeros(1, length, width), rows.clone(), last.clone())
            return self._capture(lambda: run(*inputs, adapters), inputs, adapters)

        captured = self._captured(key, capture)
        if captured is None:
            return run(embeddings, rows, last, adapters)
        inputs, input_rows, input_last = captured.inputs
        # The prompt never attends to the padding after it.
        inputs[:, :longest] = embeddings
        input_rows.copy_(rows)
        input_last.copy_(last)
        captured.graph.replay()
        return captured.output

    def _captured(self, key: tuple, capture: Callable[[], _CapturedPass]) -> _CapturedPass | None:
        """The pass of ``key``, which ends with its bank's id, captured now if it is new; None if it
        cannot be captured."""
        if key not in self._graphs:
            self._drop_outdated(key[-1])
            try:
                self._graphs[key] = capture()
            except torch.OutOfMemoryError:
                # Without a graph now; there may be memory for one at the next step.
                torch.cuda.empty_cache()
                return None
            except Exception as error:
                log.warning("the pass %s runs without a CUDA graph", key[:-1], exc_info=error)
                self._graphs[key] = None
        return self._graphs[key]

    def _drop_outdated(self, bank: int) -> None:
        """Drop the graphs of the bank before ``bank``, which is never used again."""
        if bank != id(None):
            for key in [key for key in self._graphs if key[-1] not in (id(None), bank)]:
                del self._graphs[key]
        if not any(self._graphs.values()):
            # The allocator frees a pool without graphs, and refuses captures into it afterwards.
            self._pool = None

    def run_continuation(
        self,
        embeddings: Tensor,
        rows: Tensor,
        starts: Tensor,
        last: Tensor,
        limit: int,
        adapters: AdapterBank | None,
    ) -> Tensor:
        run = super().run_continuation
        count, longest, width = embeddings.shape
        length = max(_next_power_of_two(longest), MIN_PROMPT)
        reach = min(max(_next_power_of_two(limit), MIN_REACH), self.cache.capacity)
        if count > 1 or length > min(MAX_PROMPT, self.cache.capacity):
            return run(embeddings, rows, starts, last, limit, adapters)
        key = ("continuation", length, reach, id(adapters))

        def capture() -> _CapturedPass:
            tensors = (embeddings.new_zeros(1, length, width), rows, starts, last)
            inputs = tuple(tensor.clone() for tensor in tensors)
            return self._capture(lambda: run(*inputs, reach, adapters), inputs, adapters)

        captured = self._captured(key, capture)
        if captured is None:
            return run(embeddings, rows, starts, last, limit, adapters)
        captured.inputs[0][:, :longest] = embeddings
        for static, value in zip(captured.inputs[1:], (rows, starts, last), strict=True):
            static.copy_(value)
        captured.graph.replay()
        return captured.output

    def _capture(
        self, run: Callable[[], Tensor], inputs: tuple[Tensor, ...], adapters: AdapterBank | None
    ) -> _CapturedPass:
        """Capture a pass; the runs before and during the capture write the same values."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # Compile, and let libraries allocate their workspaces.
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads run their own passes at the same time.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = run()
        self._pool = graph.pool()
        return _CapturedPass(graph, inputs, output, adapters)


def _next_power_of_two(count: int) -> int:
    """The smallest power of two that is at least ``count``."""
    return 1 << (count - 1).bit_length()
