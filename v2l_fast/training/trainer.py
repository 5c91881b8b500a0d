"""The training loop of a hypernetwork: optimizer, schedule, checkpoints, exact resume, progress.

Responsible for everything that does not depend on the task. The task is one callable from (batch of
example indices, step) to a scalar loss and numbers to log; it must draw its randomness from the
step or from torch's generator, both of which a checkpoint restores.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from v2l_fast.training.checkpoint import (
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    named_parameters,
    rotate_checkpoints,
    save_checkpoint,
)
from v2l_fast.training.sampler import EpochSampler
from v2l_fast.training.schedule import trapezoid

StepLoss = Callable[[list[int], int], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class TrainSettings:
    """Optimization settings. Scalers train at `scaler_lr_factor` times the rate, without decay."""

    steps: int
    batch: int
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    scaler_lr_factor: float = 5.0
    clip: float = 1.0
    warmup: int = 100
    decay_share: float = 0.4
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    log_every: int = 20
    seed: int = 0


def make_optimizer(module: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW in two groups: the scalers (scaler_A.*, scaler_B.*), and all other parameters."""
    parameters = named_parameters(module)
    scalers = [p for n, p in parameters.items() if n.startswith("scaler_")]
    others = [p for n, p in parameters.items() if not n.startswith("scaler_")]
    return torch.optim.AdamW(
        [
            {"params": others, "factor": 1.0, "weight_decay": settings.weight_decay},
            {"params": scalers, "factor": settings.scaler_lr_factor, "weight_decay": 0.0},
        ],
        lr=settings.lr,
        betas=settings.betas,
    )


def train(
    module: nn.Module,
    step_loss: StepLoss,
    examples: int,
    settings: TrainSettings,
    folder: str | Path,
    stop_after: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train `module` in place for `settings.steps` steps and return the run's record.

    Checkpoints lie in `folder`; training continues from the latest one there, bit for bit as if it
    had never stopped. `log.jsonl` there gets one line every `log_every` steps.

    stop_after: leave after this many steps of this call, with a checkpoint.
    Raises CheckpointError when a checkpoint there belongs to another model.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parameters = named_parameters(module)
    optimizer = make_optimizer(module, settings)
    sampler = EpochSampler(examples, settings.batch, settings.seed)
    torch.manual_seed(settings.seed)
    step, seconds = 0, 0.0
    found = latest_checkpoint(folder)
    if found is not None:
        progress = load_checkpoint(found, parameters, optimizer)
        step, seconds = progress["step"], progress["seconds"]
        sampler.restore(progress["sampler"])
    last = settings.steps if stop_after is None else min(settings.steps, step + stop_after)
    started = time.perf_counter() - seconds
    numbers: dict[str, float] = {}
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, disable=quiet) as bar:
        task = bar.add_task("training", total=settings.steps, completed=step, note="")
        while step < last:
            factor = trapezoid(step, settings.steps, settings.warmup, settings.decay_share)
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * factor * group["factor"]
            loss, numbers = step_loss(sampler.next(), step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters.values(), settings.clip)
            optimizer.step()
            step += 1
            if step % settings.log_every == 0 or step == last:
                seconds = time.perf_counter() - started
                numbers = {"loss": loss.item(), "grad_norm": norm.item(), **numbers}
                _log(folder / "log.jsonl", {"step": step, "seconds": round(seconds, 1), **numbers})
                note = " ".join(f"{name} {value:.3f}" for name, value in numbers.items())
                bar.update(task, completed=step, note=note)
            if step % settings.checkpoint_every == 0 or step == last:
                state = {"step": step, "seconds": time.perf_counter() - started}
                save_checkpoint(
                    checkpoint_path(folder, step), parameters, optimizer,
                    {**state, "sampler": sampler.state()},
                )
                rotate_checkpoints(folder, settings.keep_checkpoints)
    return {
        "settings": asdict(settings),
        "examples": examples,
        "parameters": sum(p.numel() for p in parameters.values()),
        "steps": step,
        "seconds": round(time.perf_counter() - started, 1),
        "last": {k: round(v, 5) for k, v in numbers.items() if math.isfinite(v)},
    }


def _log(path: Path, line: dict[str, float]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps({k: round(v, 5) for k, v in line.items()}) + "\n")


def write_record(path: str | Path, record: dict[str, Any]) -> None:
    """Write a JSON record atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(part, path)
