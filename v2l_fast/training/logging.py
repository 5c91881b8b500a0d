"""What a run measures and shows: means of losses, speed, the progress bar and `log.jsonl`.

`Meter` keeps losses on the device until a log line needs them, `Speed` counts videos, frames and
operations, `StepCost` computes the operations for model FLOPs utilization (MFU), and `RunReport`
writes to the terminal, to the run's files and to the trackers.
"""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from torch import Tensor

from csrc_triton.device import peak_of
from v2l_fast.console import log, printable
from v2l_fast.data.readers import Sample
from v2l_fast.files import append_jsonl
from v2l_fast.hypernet.config import HypernetConfig
from v2l_fast.training.checkpoint import RunFolder
from v2l_fast.training.loader import StepBatch
from v2l_fast.training.step import StepResult
from v2l_fast.vlm import Backbone

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
    """A progress bar with a line of numbers below it, which a narrow terminal truncates."""

    note = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.note, no_wrap=True, overflow="ellipsis")


class RunReport:
    """Writes a run's numbers to the terminal, its files and the trackers; owns the progress bar.

    Args:
        folder: of the run.
        steps: of the whole run, of which `start` are done.
        track: sends numbers and texts of a step to the trackers.
        enabled: False on all processes but the main one.
        console: standard error if omitted.
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
        self.latest: dict[str, float | None] = {}
        self.started, self.start = time.perf_counter(), start
        self.bar = _Bar(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=self.console, disable=not self.live,
        )  # fmt: skip
        self.task = self.bar.add_task("training", total=steps, completed=start)

    def __enter__(self) -> RunReport:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        self.bar.update(self.task, completed=step)

    def log(self, step: int, numbers: dict[str, float | None]) -> None:
        """Write a log line, send it to the trackers and show it."""
        if not self.enabled:
            return
        append_jsonl(self.folder.log, [{"step": step, **numbers}])
        self.track({name: value for name, value in numbers.items() if value is not None}, step)
        self.latest |= {name: value for name, value in numbers.items() if name in SHOWN}
        note = " · ".join(
            text.format(self.latest[name]) if self.latest[name] is not None else "MFU n/a"
            for name, text in SHOWN.items()
            if name in self.latest
        )
        self.bar.note = note
        self.bar.update(self.task, completed=step)
        if not self.live:
            self.say(f"step {step}/{self.steps} · {note} · {self._left(step)} left")

    def validation(self, step: int, values: dict[str, float]) -> None:
        """Report the numbers of a validation pass."""
        if self.enabled:
            append_jsonl(self.folder.log, [{"step": step, **values}])
            self.track(dict(values), step)
            self.latest |= {name: value for name, value in values.items() if name in SHOWN}
            text = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
            self.say(f"step {step} · {text}")

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Report generated answers with the references."""
        if not self.enabled:
            return
        for row in rows:
            append_jsonl(self.folder.samples, [{"step": step, **row}])
            self.say(
                f"step {step} · {row['video']} · {row['question']}\n"
                f"    says: {row['answer']}\n    true: {row['reference']}"
            )
        text = "\n\n".join(
            f"{r['question']}  \nsays: {r['answer']}  \ntrue: {r['reference']}" for r in rows
        )
        self.track({"samples": text}, step)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
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
    """Peak memory so far in GB, of the GPU or else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes, except on macOS.
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """Hardware and versions, for the record of a run."""
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


# Name -> [sum, number].
Sums = dict[str, list[float]]


class Meter:
    """Sums of losses since the last log line, which stay on the device until :meth:`merge`.

    Means are the same, to the last bit, whether or not the run was interrupted: each step's
    numbers are added over the processes in order of rank, then the steps in order of time.

    Args:
        counts: whether this process's entries count as steps; those of one process must.
    """

    def __init__(self, counts: bool = True) -> None:
        self._counts = float(counts)
        self._merged: list[Sums] = []
        self._pending: list[dict[str, Tensor]] = []

    def add(self, results: list[StepResult], norm: Tensor) -> None:
        """Add a step: the results of this process's micro-batches, each with its part of the
        batch's loss, and the norm of the whole batch's gradient."""
        loss = torch.stack([result.loss.detach().float() for result in results]).sum()
        entry = {"loss": self._entry(loss), "grad_norm": self._entry(norm.float() * self._counts)}
        for result in results:
            for name, pair in result.parts.items():
                entry[name] = entry[name] + pair if name in entry else pair
        self._pending.append(entry)

    def merge(self, gather: Callable[[list[Sums]], list[list[Sums]]]) -> None:
        """Copy the pending steps of all processes to the host; this waits for the device.

        gather: maps a value to the list of all processes' values, in order of rank.
        """
        flat = [pair for entry in self._pending for pair in entry.values()]
        values = iter(torch.stack(flat).tolist() if flat else [])
        own = [{name: next(values) for name in entry} for entry in self._pending]
        self._pending = []
        for step in zip(*gather(own), strict=True):
            self._merged.append(added(step))

    def first_bad_step(self) -> int | None:
        """Age in steps of the first merged step whose loss or gradient is not finite, or None."""
        for index, step in enumerate(self._merged):
            if not all(math.isfinite(step[name][0]) for name in ("loss", "grad_norm")):
                return len(self._merged) - 1 - index
        return None

    def means(self) -> dict[str, float]:
        """Means over the merged steps, which are then dropped."""
        sums = added(self._merged)
        self._merged = []
        return means(sums)

    def state(self) -> list[Any]:
        """The merged steps as JSON values, for a checkpoint."""
        return self._merged

    def restore(self, state: list[Any]) -> None:
        """Continue from the `state` of a checkpoint."""
        self._merged = state

    def _entry(self, value: Tensor) -> Tensor:
        return torch.stack([value, torch.full_like(value, self._counts)])


def added(parts: Any) -> Sums:
    """Sums and numbers by name, added in the order of `parts`."""
    total: Sums = {}
    for part in parts:
        for name, (value, number) in part.items():
            pair = total.setdefault(name, [0.0, 0.0])
            pair[0] += value
            pair[1] += number
    return total


def means(sums: Sums) -> dict[str, float]:
    """Sum over number of each name."""
    return {name: value / max(number, 1.0) for name, (value, number) in sums.items()}


class Speed:
    """Throughput of this process since the last log line.

    Args:
        cost: operations of a video.
        peak: FLOP/s of one device; None if unknown.
        processes: number of processes of the run.
    """

    def __init__(self, cost: StepCost, peak: float | None, processes: int) -> None:
        self.cost, self.peak, self.processes = cost, peak, processes
        self.sums, self.since = [0.0] * 5, time.perf_counter()

    def add(self, batch: StepBatch) -> None:
        """Count the videos of a step."""
        samples = batch.samples
        new = (
            len(samples),
            sum(sample.frames for sample in samples),
            batch.waited,
            sum(sample.decode_seconds for sample in samples),
            sum(self.cost.sample(sample) for sample in samples),
        )
        self.sums = [old + value for old, value in zip(self.sums, new, strict=True)]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While entered, time does not count as training time."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def take(self, total: Callable[[Sequence[float]], list[float]]) -> dict[str, float | None]:
        """Rates since the last call; `total` sums numbers over the processes."""
        seconds = max(time.perf_counter() - self.since, 1e-9)
        videos, frames, waited, decoded, flops = total(self.sums)
        self.sums, self.since = [0.0] * 5, time.perf_counter()
        mfu = None if self.peak is None else flops / seconds / self.peak / self.processes
        return {
            "samples_per_second": videos / seconds,
            "frames_per_second": frames / seconds,
            "decode_wait": waited / seconds / self.processes,
            "decode_seconds_per_video": decoded / max(videos, 1),
            "mfu": mfu,
        }


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of a device; None for a CPU and unknown GPUs."""
    if device.type != "cuda":
        return None
    peak = peak_of(torch.cuda.get_device_name(device))
    return None if peak is None else peak.flops


@dataclass(frozen=True)
class StepCost:
    """Floating-point operations per token of each part of the step.

    Only matrix products count, a multiply-add as two; recomputation in the backward pass does not,
    as is usual for MFU.

    Attributes:
        view: vision tower and connector per view, forward.
        context: decoder layers before the last per context token, forward.
        hypernet: all layer slices per context token, forward and backward.
        chunk: all layer slices per chunk, forward and backward, whatever the context's length.
        answer: decoder per token of a response row, forward and backward to the inputs of all
            layers but the first.
        update: the ranks that a chunk, or the bias adapter, adds to `answer`.
        logits: LM head per answer token, forward and backward to its input.
        attention: one pair of tokens in one decoder layer, forward.
        layers: number of decoder layers.
        shared: 1 with a bias adapter, else 0.
    """

    view: float
    context: float
    hypernet: float
    chunk: float
    answer: float
    update: float
    logits: float
    attention: float
    layers: int
    shared: int

    @classmethod
    def of(cls, backbone: Backbone, config: HypernetConfig) -> StepCost:
        """The costs of a frozen model with a hypernetwork of `config`."""
        decoder = backbone.decoder
        layer = sum(p.numel() for p in decoder.text_model.layers[0].parameters() if p.dim() == 2)
        layers, dim, size = decoder.num_layers, config.hidden_size, config.latent_size
        heads = config.num_heads * config.head_dim
        rows = config.num_latents * config.num_heads
        decoded = len(config.target_modules) * config.rank
        widths = sum(sum(sizes) for sizes in config.target_modules.values())
        # Per context token: gate and up (frozen input: no gradient to it), down, then scores and
        # values of every latent row.
        token = 2 * 2 * (2 * dim * 4 * dim)
        token += 3 * (2 * 4 * dim * size + config.num_blocks * 4 * rows * size)
        # Per slice: projections and MLPs of the latents, the head.
        latent = 2 * (2 * size * heads + 3 * 4 * size * size)
        head = 2 * config.rank * size * widths
        slice_ = config.num_blocks * config.num_latents * latent + decoded * latent + head
        vision = backbone.model.model
        tower = sum(p.numel() for p in vision.vision_model.encoder.parameters() if p.dim() == 2)
        view = backbone.prompt_builder.tokens_per_view
        patches = view * backbone.model.config.scale_factor**2
        connector = sum(p.numel() for p in vision.connector.parameters() if p.dim() == 2)
        vision_layers = len(vision.vision_model.encoder.layers)
        width = backbone.model.config.vision_config.hidden_size
        return cls(
            view=2 * tower * patches
            + 4 * patches**2 * width * vision_layers
            + 2 * connector * view,
            context=2 * layer * (layers - 1),
            hypernet=token * layers,
            chunk=3 * slice_ * layers,
            answer=2 * layer * (2 * layers - 1),
            update=6 * config.rank * widths * layers,
            logits=4 * dim * decoder.lm_head.out_features,
            attention=4 * dim,
            layers=layers,
            shared=int(config.bias_adapter),
        )

    def sample(self, sample: Sample) -> float:
        """Operations of one video."""
        return self.contexts(sample) + self.responses(sample)

    def contexts(self, sample: Sample) -> float:
        """Operations of its adapter: encoding every chunk, and the hypernetwork."""
        total = 0.0
        for chunk in sample.chunks:
            tokens = len(chunk.ids)
            pairs = tokens * tokens / 2 * self.attention * (self.layers - 1)
            total += chunk.num_views * self.view + tokens * (self.context + self.hypernet)
            total += self.chunk + pairs
        return total

    def responses(self, sample: Sample) -> float:
        """Operations of its loss: each response is a row of its own, without its last token."""
        token = self.answer + self.update * (len(sample.chunks) + self.shared)
        # The backward pass needs two products for each of the forward's.
        pair = self.attention * (self.layers + 2 * (self.layers - 1))
        total = 0.0
        for question, answer in sample.qa_pairs:
            tokens = len(sample.prompt_prefix) + len(question) + len(answer) - 1
            total += tokens * token + tokens * tokens / 2 * pair + len(answer) * self.logits
        return total
