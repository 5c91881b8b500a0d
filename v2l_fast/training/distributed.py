"""The processes of a run, on Accelerate, and the signals that stop them.

`Distributed` wraps the step in DistributedDataParallel and exchanges small numbers that all
processes must agree on. These travel between hosts over gloo, so no process waits for its GPU.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from v2l_fast.errors import ConfigError, V2LError
from v2l_fast.training.config import TrainConfig
from v2l_fast.training.config_values import spread

T = TypeVar("T")

REMEDIES = {"tensorboard": '"v2l_fast[train]"', "wandb": "wandb"}


class Distributed:
    """One process on CPU or GPU, or those that `accelerate launch` started.

    Raises:
        ConfigError: accelerate or a tracker is missing, or a GPU is asked for where there is none.
    """

    def __init__(self, config: TrainConfig) -> None:
        try:
            from accelerate import Accelerator
            from accelerate.tracking import get_available_trackers
            from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
        except ImportError:
            raise ConfigError('training needs accelerate: pip install "v2l_fast[train]"') from None
        wanted, gpu = config.run.device, torch.cuda.is_available()
        if wanted == "cuda" and not gpu:
            raise ConfigError("run.device=cuda: this machine has no usable GPU; see v2l doctor")
        installed = {str(tracker) for tracker in get_available_trackers()}
        for name in config.run.trackers:
            if name not in installed:
                raise ConfigError(
                    f"run.trackers names {name}, which is not installed: pip install "
                    f"{REMEDIES[name]}, or set run.trackers=[]"
                )
        folder = Path(config.run.folder)
        self.accelerator = Accelerator(
            cpu=wanted == "cpu" or not gpu,
            mixed_precision="no",
            log_with=list(config.run.trackers) or None,
            project_config=ProjectConfiguration(str(folder), str(folder / "tensorboard")),
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        self.rank = self.accelerator.process_index
        self.count = self.accelerator.num_processes
        self.device = self.accelerator.device
        self.is_main = self.accelerator.is_main_process
        self._hosts = None
        if self.count > 1:
            self._hosts = torch.distributed.new_group(backend="gloo")

    def wrap(self, step: nn.Module) -> nn.Module:
        """The step with gradients averaged over the processes."""
        return self.accelerator.prepare_model(step)

    def exchange(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch: gradients travel after the last one."""
        return nullcontext() if last else self.accelerator.no_sync(model)

    def backward(self, loss: Tensor) -> None:
        """Backward pass of this process's part of the whole batch's loss."""
        # Gradients are averaged over the processes; the sum over them is what is meant.
        self.accelerator.backward(loss * self.count)

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, known to each of them."""
        if self._hosts is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(tensor, group=self._hosts)
        return tensor.tolist()

    def gather(self, value: T) -> list[T]:
        """Every process's value, in order of rank."""
        if self._hosts is None:
            return [value]
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value, group=self._hosts)
        return found

    def on_main_process(self, action: Callable[[], None]) -> None:
        """The first process acts, and no other goes on before; its error is that of all.

        Raises:
            V2LError: that of the action.
        """
        failure: V2LError | None = None
        if self.is_main:
            try:
                action()
            except V2LError as error:
                failure = error
        failure = self.gather(failure)[0]
        if failure is not None:
            raise failure

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The first process runs the body, then the others do."""
        if self._hosts is None:
            yield
            return
        # It may train a base model meanwhile; in the training itself nobody waits so long.
        patient = torch.distributed.new_group(backend="gloo", timeout=timedelta(hours=6))
        if not self.is_main:
            torch.distributed.barrier(patient)
        yield
        if self.is_main:
            torch.distributed.barrier(patient)

    def start_trackers(self, config: TrainConfig, start: int, run_id: str) -> None:
        """Open TensorBoard and others; points after `start` are those of a run cut off there.

        run_id: the same for all parts of an interrupted run.

        Raises:
            ConfigError: W&B does not start, as without a login.
        """
        flat = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in spread(asdict(config)).items()
        }
        name = config.run.name or Path(config.run.folder).name
        wandb = {"id": run_id, "name": name, "dir": config.run.folder, "resume": "allow"}
        try:
            self.accelerator.init_trackers(
                "v2l_fast",
                config=flat if start == 0 else None,
                init_kwargs={"tensorboard": {"purge_step": start + 1}, "wandb": wandb},
            )
        except _wandb_errors() as error:
            # Accelerate would finish what has not started.
            self.accelerator.trackers.clear()
            raise ConfigError(
                f"run.trackers names wandb, which does not start ({error}); set "
                "WANDB_MODE=offline, which needs no account, or leave it out"
            ) from None

    def track(self, numbers: dict[str, float | str], step: int) -> None:
        """Numbers and texts to the trackers, from the first process."""
        if self.accelerator.trackers:
            self.accelerator.log(numbers, step=step)

    def close(self) -> None:
        """Flush the trackers and leave the group."""
        self.accelerator.end_training()


def _wandb_errors() -> tuple[type[Exception], ...]:
    """W&B's own, where it is in use."""
    wandb = sys.modules.get("wandb")
    return () if wandb is None else (wandb.Error,)


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
