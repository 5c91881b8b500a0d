"""Long work in small units: a generator names each unit before it does it, and returns the result.

A caller that interleaves work advances the generator one unit at a time; :func:`finish` runs all.
Units are bounded whatever the length of a video: a pass over a long context is split into chunks of
tokens, and a context of one chunk is computed as it would be without chunks, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from math import isqrt
from typing import TypeVar

import torch

# Stage, units of it done, units of it in all.
Step = tuple[str, int, int]

Result = TypeVar("Result")

# Tokens of one chunk: some tenths of a second for a decoder layer of SmolVLM2-500M.
UNIT_TOKENS = {"cpu": 2048, "cuda": 32768}


def unit_tokens(device: torch.device) -> int:
    """Tokens of a context that one unit of work processes."""
    return UNIT_TOKENS.get(device.type, UNIT_TOKENS["cpu"])


def chunks(length: int, unit: int) -> Iterator[slice]:
    """``length`` tokens in chunks of at most ``unit``."""
    return (slice(i, min(i + unit, length)) for i in range(0, length, unit))


def causal_chunks(length: int, unit: int) -> Iterator[slice]:
    """The same for a pass in which each token attends to all before it.

    Chunks shrink towards the end: a chunk's tokens times those they attend to are at most
    ``unit`` squared, but for chunks of one token.
    """
    start = 0
    while start < length:
        # The largest count for which count * (start + count) <= unit².
        count = (isqrt(start * start + 4 * unit * unit) - start) // 2
        stop = min(start + max(count, 1), length)
        yield slice(start, stop)
        start = stop


def finish(
    steps: Generator[Step, None, Result], progress: Callable[[str, int, int], None] | None = None
) -> Result:
    """Do all that is left; ``progress`` is told of each unit before it is done."""
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            return end.value
        if progress is not None:
            progress(*step)


def named(units: Generator[None, None, Result], step: Step) -> Generator[Step, None, Result]:
    """Units without names as parts of one step."""
    while True:
        try:
            next(units)
        except StopIteration as end:
            return end.value
        yield step
