"""Long computations as generators of bounded work units.

A generator yields a :data:`WorkUnit` before it computes it, and returns the result. A caller that
interleaves work advances the generator one unit at a time; :func:`run_to_completion` runs all of
it. Units are bounded whatever the length of a video: a pass over a long context is split into
chunks of tokens. A context of one chunk is computed exactly as without chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from math import ceil, isqrt
from typing import TypeVar

import torch

# Stage, units of it done, units of it in total.
WorkUnit = tuple[str, int, int]
# Called with the fields of each unit before it is computed.
Progress = Callable[[str, int, int], None]

Result = TypeVar("Result")

# Tokens of one chunk: a few tenths of a second for a decoder layer of SmolVLM2-500M in float32.
TOKENS_PER_UNIT = {"cpu": 2048, "cuda": 32768}


def silent(stage: str, done: int, total: int) -> None:
    """Discard a progress report."""


def tokens_per_unit(device: torch.device) -> int:
    """Context tokens that one work unit of the decoder or the hypernetwork processes."""
    return TOKENS_PER_UNIT.get(device.type, TOKENS_PER_UNIT["cpu"])


def tokens_per_group(
    device: torch.device, gradients: bool, dtype: torch.dtype = torch.float32
) -> int:
    """Context tokens of the layers that the hypernetwork computes together.

    Each group reads the hypernetwork's weights once. Without gradients a CPU takes twice the tokens
    of a unit, in half precision three times as many, which is a second of one core at the 500M
    shape in either case; with gradients the activations of a whole group are in memory at once.

    Args:
        dtype: of the context features.
    """
    unit = tokens_per_unit(device)
    if gradients or device.type != "cpu":
        return unit
    return 3 * unit if dtype.itemsize < 4 else 2 * unit


def layers_per_group(tokens: int, layers: int, budget: int) -> int:
    """Number of layers that the hypernetwork computes together.

    As few groups as the budget allows, of sizes as equal as they can be: a last group of few
    layers would read all weights for these.

    Args:
        tokens: context tokens of one layer, of all contexts of the batch.
        layers: number of layers, at least 1.
        budget: tokens of a group that has more than one layer, see :func:`tokens_per_group`.
    """
    most = max(1, min(layers, budget // max(1, tokens)))
    return ceil(layers / ceil(layers / most))


def token_chunks(length: int, unit: int) -> Iterator[slice]:
    """``length`` tokens in chunks of at most ``unit``."""
    return (slice(i, min(i + unit, length)) for i in range(0, length, unit))


def causal_token_chunks(length: int, unit: int) -> Iterator[slice]:
    """Chunks for causal attention, where a chunk also attends to all tokens before it.

    Chunks shrink towards the end: a chunk's tokens times the tokens they attend to are at most
    ``unit`` squared, except for chunks of one token.
    """
    start = 0
    while start < length:
        # The largest count for which count * (start + count) <= unit².
        count = (isqrt(start * start + 4 * unit * unit) - start) // 2
        stop = min(start + max(count, 1), length)
        yield slice(start, stop)
        start = stop


def run_to_completion(
    units: Generator[WorkUnit, None, Result], progress: Progress | None = None
) -> Result:
    """Run the remaining units and return the generator's result."""
    while True:
        try:
            unit = next(units)
        except StopIteration as end:
            return end.value
        if progress is not None:
            progress(*unit)


def units_within(
    context: Callable[[], AbstractContextManager[object]],
    units: Generator[WorkUnit, None, Result],
) -> Generator[WorkUnit, None, Result]:
    """The same units, each in a context of its own, which code between units is not in."""
    while True:
        with context():
            try:
                unit = next(units)
            except StopIteration as end:
                return end.value
        yield unit


def label_units(
    units: Generator[None, None, Result], label: WorkUnit
) -> Generator[WorkUnit, None, Result]:
    """Unlabeled units, each yielded as ``label``."""
    while True:
        try:
            next(units)
        except StopIteration as end:
            return end.value
        yield label
