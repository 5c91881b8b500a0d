"""Asked to stop: SIGTERM and Ctrl-C let the step finish, so that a checkpoint can be written."""

from __future__ import annotations

import signal
from types import FrameType


class Stopped(SystemExit):
    """The run was stopped by a signal after saving; exits with 128 + the signal's number."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(128 + number)
        self.signal, self.step = signal.Signals(number).name, step


class StopSignals:
    """While entered, notes the first SIGTERM or SIGINT; a second one acts as it always does."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
