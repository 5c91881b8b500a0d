"""W&B as a tracker, on a stand-in for its package: one run in it, however often it is stopped."""

from __future__ import annotations

import signal
import sys
from types import SimpleNamespace

import pytest
from accelerate.utils import LoggerType

from tests import tiny
from tests.training.test_trainer import curve
from tests.training.tiny_run import run, settings
from v2l_fast.errors import ConfigError
from v2l_fast.training.distributed import Stopped

WANDB = 'run.trackers=["wandb"]'


class Wandb:
    """What Accelerate calls of the package, and what it was called with."""

    class Error(Exception):
        """The base of its errors."""

    def __init__(self) -> None:
        self.starts: list[dict] = []
        self.settings: list[dict] = []
        self.points: list[tuple[int, dict]] = []
        self.finished = 0
        self.config = SimpleNamespace(update=self.update)

    def init(self, **options) -> Wandb:
        if not options["name"].isalnum():
            raise self.Error("No API key configured.")
        self.starts.append(options)
        return self

    def update(self, values: dict, allow_val_change: bool) -> None:
        self.settings.append(values)

    def log(self, values: dict, step: int) -> None:
        self.points.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    actual = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", actual)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    return actual


def test_a_stopped_run_continues_in_the_same_one(wandb, tmp_path):
    folder = tmp_path / "mine"
    with pytest.raises(Stopped):
        run(settings(folder, WANDB), events={3: signal.SIGTERM})
    run(settings(folder, WANDB))
    first, second = wandb.starts
    assert first == second and wandb.finished == 2
    assert first["name"] == "mine" and first["dir"] == str(folder) and first["resume"] == "allow"
    (given,) = wandb.settings
    assert given["optim.lr"] == 1e-2
    losses = [(step, values["loss"]) for step, values in wandb.points if "loss" in values]
    assert losses == [(x["step"], x["loss"]) for x in curve(folder) if x["loss"] is not None]
    steps = [step for step, _ in wandb.points]
    assert steps == sorted(steps)


def test_another_run_has_another_id(wandb, tmp_path):
    for name in ("a", "b"):
        run(settings(tmp_path / name, WANDB, "optim.steps=1"))
    first, second = (start["id"] for start in wandb.starts)
    assert first != second


def test_errors_name_the_remedy(wandb, tmp_path):
    with pytest.raises(ConfigError, match="does not start .No API key configured.*offline"):
        run(settings(tmp_path, WANDB, 'run.name="no key"'), tiny.backbone())
