"""Long work in small units: a generator names each unit before it does it, and returns the result.

Whoever does more than one thing at a time runs a unit, then something else; :func:`finish` runs
them all.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

# Stage, units of it done, units of it in all.
Step = tuple[str, int, int]

Result = TypeVar("Result")


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
