"""Several processes, killed and not: real ones, over gloo."""

import contextlib
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.tiny import json_lines
from tests.training.test_trainer import curve, same, weights
from tests.training.tiny_run import run, settings
from tests.waiting import LIMIT
from v2l_fast.training.checkpoint import (
    RunFolder,
    checkpoint_path,
    latest_checkpoint,
    read_progress,
)

ROOT = Path(__file__).parents[2]
# Both the exact loss curve and, from every step, the gradient as AdamW first saw it.
SETTINGS = (
    "optim.micro_batch_size=2", "optim.clip=0", "run.checkpoint_every=1", "run.keep=9",
    "run.log_every=2", "data.val_videos=0",
)  # fmt: skip
BROKEN = 5


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Settings that start from a network whose every parameter has a gradient: a fresh one's
    scalers are zero."""
    folder = tmp_path_factory.mktemp("start")
    tiny.hypernetwork().save_pretrained(folder)
    return f'model.init="{folder}"'


def unused_port() -> int:
    """A port that nobody listens on, and that no one is given who asks for any."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def launch(
    folder: Path, processes: int, start: str, *events: list[str], batch: int = 8
) -> list[int]:
    """Exit codes of the processes of one run; events[r] are arguments of process r."""
    port = unused_port()
    started = []
    for rank in range(processes):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        extra = events[rank] if events else []
        command = [
            sys.executable, "-m", "tests.training.tiny_run", f'run.folder="{folder}"', *SETTINGS,
            start, f"optim.batch_size={batch}", f"--broken={BROKEN}", *extra,
        ]  # fmt: skip
        with open(folder.parent / f"{folder.name}-{rank}.log", "ab") as output:
            started.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
                )
            )
    try:
        return [process.wait(timeout=LIMIT) for process in started]
    finally:
        for process in started:
            process.kill()


@pytest.fixture(scope="module")
def pair(tmp_path_factory, start):
    """Two processes to the end."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    assert launch(folder, 2, start) == [0, 0]
    return folder


def assert_same_gradients(one: Path, other: Path) -> None:
    """Of the first step, as AdamW saw them."""
    firsts = [load_file(checkpoint_path(f / "checkpoints", 1)) for f in (one, other)]
    moments = [n for n in firsts[0] if n.endswith(".exp_avg")]
    assert len(moments) == len(list(tiny.hypernetwork().parameters()))
    for name in moments:
        alone, shared = (checkpoint[name] for checkpoint in firsts)
        # The same terms in another order, each good to float32.
        assert (alone - shared).norm() <= 1e-5 * alone.norm(), name
        assert alone.norm() > 0


def test_two_processes_learn_what_one_does(pair, start, tmp_path):
    """Micro-batches of 2 on two processes and of 8 on one, a broken video in one share."""
    one = settings(tmp_path, *SETTINGS, start, "optim.micro_batch_size=8")
    run(one, tiny.backbone(), broken=frozenset({BROKEN}))
    assert_same_gradients(tmp_path, pair)
    for alone, shared in zip(curve(tmp_path), curve(pair), strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert shared["qa"] == pytest.approx(alone["qa"], rel=1e-4)
    for folder in (tmp_path, pair):
        assert [x["video"] for x in json_lines(folder / "quarantine.jsonl")] == [f"video {BROKEN}"]


@pytest.mark.slow
def test_killed_processes_continue_bit_for_bit(pair, start, tmp_path):
    folder = tmp_path / "run"
    kill = ["--kill-at", "4"]
    assert launch(folder, 2, start, kill, kill) == [-9, -9]
    assert read_progress(latest_checkpoint(folder / "checkpoints"))["step"] == 4
    # As if the last checkpoint had not been written yet, inside an interval of the log.
    checkpoint_path(folder / "checkpoints", 4).unlink()
    assert launch(folder, 2, start) == [0, 0]
    assert curve(folder) == curve(pair)
    assert same(weights(folder), weights(pair))


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all(start, tmp_path):
    """With shares of 3 and 4 of a batch of 7, whose sum is still what one process computes."""
    folder = tmp_path / "run"
    assert launch(folder, 2, start, [], ["--stop-at", "2"], batch=7) == [143, 143]
    assert read_progress(latest_checkpoint(folder / "checkpoints"))["step"] == 3
    whole = settings(
        tmp_path / "one", *SETTINGS, start, "optim.batch_size=7", "optim.micro_batch_size=7"
    )
    run(whole, tiny.backbone(), broken=frozenset({BROKEN}))
    assert_same_gradients(tmp_path / "one", folder)


@pytest.mark.slow
def test_an_error_of_the_main_process_is_raised_on_all(start, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open(None)
    assert launch(folder.path, 2, start) == [1, 1]
    folder.close()
    for rank in range(2):
        last = (tmp_path / f"run-{rank}.log").read_text().splitlines()[-1]
        assert "another run is writing here" in last


@pytest.mark.slow
def test_one_killed_process_continues_bit_for_bit(start, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    config = settings(whole, *SETTINGS, start)
    run(config, tiny.backbone(), broken=frozenset({BROKEN}))
    assert launch(parts, 1, start, ["--kill-at", "3"]) == [-9]
    checkpoint_path(parts / "checkpoints", 3).unlink()
    run(settings(parts, *SETTINGS, start), tiny.backbone(), broken=frozenset({BROKEN}))
    assert curve(parts) == curve(whole)
    assert same(weights(parts), weights(whole))
    assert torch.equal(
        load_file(checkpoint_path(parts / "checkpoints", 7))["optimizer.0.exp_avg_sq"],
        load_file(checkpoint_path(whole / "checkpoints", 7))["optimizer.0.exp_avg_sq"],
    )
