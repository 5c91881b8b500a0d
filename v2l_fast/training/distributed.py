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
from v2l_fast.training.config import TrainConfig, flatten

T = TypeVar("T")

REMEDIES = {"tensorboard": '"v2l_fast[train]"', "wandb": "wandb"}


class Distributed:
    """One process on CPU or GPU, or those that `accelerate launch` or `torchrun` started.

    Raises:
        ConfigError: accelerate or a tracker is not installed, or `run.device` is a missing GPU.
    """

    def __init__(self, config: TrainConfig) -> None:
        try:
            from accelerate import Accelerator
            from accelerate.tracking import get_available_trackers
            from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
        except ImportError:
            raise ConfigError('training needs accelerate: pip install "v2l_fast[train]"') from None
        device, gpu = config.run.device, torch.cuda.is_available()
        if device == "cuda" and not gpu:
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
            cpu=device == "cpu" or not gpu,
            mixed_precision="no",
            log_with=list(config.run.trackers) or None,
            project_config=ProjectConfiguration(str(folder), str(folder / "tensorboard")),
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        self.rank = self.accelerator.process_index
        self.count = self.accelerator.num_processes
        self.device = self.accelerator.device
        self.is_main = self.accelerator.is_main_process
        self._hosts = self._patient = None
        if self.count > 1:
            self._hosts = torch.distributed.new_group(backend="gloo")
            # A group's timeout is fixed, and processes must form it at the same time.
            six_hours = timedelta(hours=6)
            self._patient = torch.distributed.new_group(backend="gloo", timeout=six_hours)

    def wrap(self, step: nn.Module) -> nn.Module:
        """The step with gradients averaged over the processes."""
        return self.accelerator.prepare_model(step)

    def no_sync(self, model: nn.Module, active: bool = True) -> AbstractContextManager[None]:
        """While entered and `active`, backward passes accumulate gradients without averaging."""
        return self.accelerator.no_sync(model) if active else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Backward pass of this process's part of the whole batch's loss."""
        # Gradients are averaged over the processes, and the batch needs their sum.
        self.accelerator.backward(loss * self.count)

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, the same on each of them."""
        if self._hosts is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(tensor, group=self._hosts)
        return tensor.tolist()

    def gather(self, value: T) -> list[T]:
        """Every process's value, in order of rank."""
        if self._hosts is None:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value, group=self._hosts)
        return values

    def on_main_process(self, action: Callable[[], None]) -> None:
        """Run on the main process while the others wait; re-raise its error everywhere.

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
        """Run the body on the main process, then on the others."""
        # The main process may train a base model in it.
        if not self.is_main:
            self.wait_for_all()
        yield
        if self.is_main:
            self.wait_for_all()

    def wait_for_all(self) -> None:
        """Wait until every process is here, up to six hours: the training itself waits less."""
        if self._patient is not None:
            torch.distributed.barrier(self._patient)

    def start_trackers(self, config: TrainConfig, start: int, run_id: str) -> None:
        """Open the trackers; points after step `start` belong to a run that was interrupted there.

        run_id: the same for all parts of an interrupted run.

        Raises:
            ConfigError: W&B does not start, as without a login.
        """
        flat = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in flatten(asdict(config)).items()
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
            # Otherwise Accelerate would finish a tracker that has not started.
            self.accelerator.trackers.clear()
            raise ConfigError(
                f"run.trackers names wandb, which does not start ({error}); set "
                "WANDB_MODE=offline, which needs no account, or leave it out"
            ) from None

    def track(self, numbers: dict[str, float | str], step: int) -> None:
        """Send numbers and texts to the trackers, from the main process."""
        if self.accelerator.trackers:
            self.accelerator.log(numbers, step=step)

    def close(self) -> None:
        """Flush the trackers and leave the process group."""
        self.accelerator.end_training()


def _wandb_errors() -> tuple[type[Exception], ...]:
    """W&B's own errors, where it is in use."""
    wandb = sys.modules.get("wandb")
    return () if wandb is None else (wandb.Error,)


class Stopped(SystemExit):
    """A signal stopped the run after a checkpoint; the exit code is 128 + the signal's number."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(128 + number)
        self.signal, self.step = signal.Signals(number).name, step


class StopSignals:
    """While entered, records the first SIGTERM or SIGINT; a second one has its usual effect.

    The step finishes and a checkpoint is written before the run ends.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

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
