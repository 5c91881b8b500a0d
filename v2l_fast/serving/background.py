"""Long work beside answering: one unit of it between two decode steps.

A worker thread does what needs no model, decoding and resizing, and hands the rest, a generator of
units, to the engine's thread, which runs them in turn with its own work. Neither starves: a decode
step waits for one unit at most, and every step does one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from v2l_fast.errors import V2LError
from v2l_fast.serving.requests import Cancellation
from v2l_fast.work_units import WorkUnit

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Task:
    steps: Generator[WorkUnit, None, Any]
    progress: Callable[[str, int, int], None]
    cancellation: Cancellation
    done: Future


class Background:
    """Tasks in turn.

    Args:
        wake: called when there is something to do.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._tasks: deque[_Task] = deque()
        self._closed: V2LError | None = None

    def __len__(self) -> int:
        return len(self._tasks)

    def run(
        self,
        steps: Generator[WorkUnit, None, Result],
        progress: Callable[[str, int, int], None] | None = None,
        cancellation: Cancellation | None = None,
    ) -> Result:
        """In a worker thread: the "decode" stage, then wait until the engine's thread has done the
        rest.

        Raises:
            JobCancelled: ``cancellation`` was requested; no further unit runs.
            V2LError: what a unit raised, or the reason of :meth:`close`.
        """
        # Frames that are on a GPU are resized there from this thread, beside the engine's passes:
        # both use the device's default stream, so what the engine reads afterwards is complete.
        progress = progress or (lambda stage, done, total: None)
        cancellation = cancellation or Cancellation()
        stage = "decode"
        while stage == "decode":
            cancellation.check()
            if self._closed is not None:
                raise self._closed
            step = stage, _, _ = next(steps)
            progress(*step)
        task = _Task(steps, progress, cancellation, Future())
        with self._lock:
            if self._closed is not None:
                raise self._closed
            self._tasks.append(task)
        self._wake()
        return task.done.result()

    def step(self) -> bool:
        """In the engine's thread: one unit of the task whose turn it is; whether there was one."""
        with self._lock:
            if not self._tasks:
                return False
            task = self._tasks.popleft()
        try:
            task.cancellation.check()
            step = next(task.steps)
        except StopIteration as end:
            task.done.set_result(end.value)
            return True
        except Exception as error:
            # Whose it is, the waiting thread knows.
            task.done.set_exception(error)
            return True
        task.progress(*step)
        with self._lock:
            if self._closed is None:
                self._tasks.append(task)
                return True
        # It was not among the tasks when they were ended.
        task.done.set_exception(self._closed)
        return True

    def close(self, reason: V2LError) -> None:
        """End what is left, and whatever comes, with ``reason``."""
        with self._lock:
            self._closed = reason
            tasks, self._tasks = list(self._tasks), deque()
        for task in tasks:
            task.done.set_exception(reason)
