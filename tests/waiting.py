"""Waiting for a condition: no test depends on how fast the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")

# Seconds that only a hang reaches, for every wait and timeout of a test.
LIMIT = 300.0


def wait_until(condition: Callable[[], Value], seconds: float = LIMIT) -> Value:
    """Call ``condition`` until it returns something true, and return that.

    Raises:
        AssertionError: it is still false after ``seconds``.
    """
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"still not after {seconds:g} s"
        time.sleep(0.005)
    return value
