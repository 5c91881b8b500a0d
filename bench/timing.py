"""Median times, on a CPU by the clock and on a GPU by events with a cold second-level cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

# More than the second-level cache of any GPU here (H200: 50 MB): a decoder's other layers evict a
# layer's weights between two tokens, so a warm cache would flatter whatever is bound by memory.
FLUSH_BYTES = 256 * 2**20
WARM_UP = 2

Call = Callable[[], object]


def together(
    calls: dict[str, Call], device: str, seconds: float = 0.5, most: int = 50, least: int = 3
) -> dict[str, float]:
    """Median seconds of each call; the calls take turns, so that all meet the same disturbances.

    Args:
        seconds: to spend on each call, at least ``least`` and at most ``most`` times.
    """
    measure = _on_gpu if device == "cuda" else _on_cpu
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda") if device == "cuda" else None
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(WARM_UP):
            measure(call, flush)
    left = set(calls)
    while left:
        for name in [name for name in calls if name in left]:
            found = times[name]
            found.append(measure(calls[name], flush))
            if len(found) >= most or (len(found) >= least and sum(found) >= seconds):
                left.discard(name)
    return {name: statistics.median(found) for name, found in times.items()}


def _on_cpu(call: Call, _: None) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _on_gpu(call: Call, flush: torch.Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    # Filling takes longer than enqueuing most calls: the events then see the GPU's time alone.
    flush.zero_()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def captured(call: Call) -> Call:
    """The call as a CUDA graph, replayed: the GPU's time without that of launching from Python."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
