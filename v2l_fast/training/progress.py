"""What a run shows and keeps about itself: a progress bar, plain lines where there is no terminal,
`log.jsonl`, `samples.jsonl` and the trackers' numbers.

Only the first process of a run reports.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from v2l_fast.console import log, printable
from v2l_fast.training.folder import RunFolder
from v2l_fast.training.records import append_line

# What the bar shows, in this order, and how; log.jsonl has everything.
SHOWN = {
    "loss": "loss {:.4f}",
    "val_loss": "val {:.4f}",
    "samples_per_second": "{:.1f} videos/s",
    "frames_per_second": "{:.0f} frames/s",
    "decode_wait": "wait {:.0%}",
    "mfu": "MFU {:.1%}",
    "memory_gb": "{:.1f} GB",
}


class _Bar(Progress):
    """A progress bar with a line of numbers below it, which a narrow terminal cuts, not wraps."""

    note = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.note, no_wrap=True, overflow="ellipsis")


class Report:
    """The report of one run; a context manager that owns the bar.

    Args:
        folder: of the run.
        steps: of the whole run; start: done before.
        track: numbers and texts of a step to the trackers.
        enabled: False in all processes but the first.
        console: where to show it; standard error if omitted.
    """

    def __init__(
        self,
        folder: RunFolder,
        steps: int,
        start: int,
        track: Callable[[dict[str, Any], int], None],
        enabled: bool = True,
        console: Console | None = None,
    ) -> None:
        self.folder, self.steps, self.track, self.enabled = folder, steps, track, enabled
        self.console = console or log
        self.live = enabled and self.console.is_terminal
        self.shown: dict[str, float | None] = {}
        self.started, self.start = time.perf_counter(), start
        self.bar = _Bar(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=self.console, disable=not self.live,
        )  # fmt: skip
        self.task = self.bar.add_task("training", total=steps, completed=start)

    def __enter__(self) -> Report:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self, step: int) -> None:
        """`step` steps are done."""
        self.bar.update(self.task, completed=step)

    def log(self, step: int, numbers: dict[str, float | None]) -> None:
        """A line of the log, numbers for the trackers, the bar's note."""
        if not self.enabled:
            return
        append_line(self.folder.log, {"step": step, **numbers})
        self.track({name: value for name, value in numbers.items() if value is not None}, step)
        self.shown |= {name: value for name, value in numbers.items() if name in SHOWN}
        note = " · ".join(
            text.format(self.shown[name]) if self.shown[name] is not None else "MFU n/a"
            for name, text in SHOWN.items()
            if name in self.shown
        )
        self.bar.note = note
        self.bar.update(self.task, completed=step)
        if not self.live:
            self.say(f"step {step}/{self.steps} · {note} · {self._left(step)} left")

    def validation(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a validation pass."""
        if self.enabled:
            append_line(self.folder.log, {"step": step, **values})
            self.track(dict(values), step)
            self.shown |= {name: value for name, value in values.items() if name in SHOWN}
            shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
            self.say(f"step {step} · {shown}")

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Generated answers beside the references."""
        if not self.enabled:
            return
        for row in rows:
            append_line(self.folder.samples, {"step": step, **row})
            self.say(
                f"step {step} · {row['video']} · {row['question']}\n"
                f"    says: {row['answer']}\n    true: {row['reference']}"
            )
        text = "\n\n".join(
            f"{r['question']}  \nsays: {r['answer']}  \ntrue: {r['reference']}" for r in rows
        )
        self.track({"samples": text}, step)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.enabled:
            self.bar.console.print(
                printable(text, lines=True), highlight=False, markup=False, emoji=False,
                soft_wrap=True,
            )  # fmt: skip

    def _left(self, step: int) -> str:
        done = step - self.start
        seconds = (time.perf_counter() - self.started) / max(done, 1) * (self.steps - step)
        return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d}"


def memory_gb(device: torch.device) -> float:
    """Peak memory so far: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes, but for macOS.
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """What a run ran on, for its record."""
    import transformers

    import v2l_fast

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "device": name,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "v2l_fast": v2l_fast.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
