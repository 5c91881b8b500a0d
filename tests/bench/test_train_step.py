"""The training-step benchmark on a tiny shape: both orders agree, every stage is timed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.released import ReleasedStep
from bench.runs import train_step
from v2l_fast.training.step import TrainStep

CASE = train_step.CASES["tiny"]


@pytest.fixture(scope="module")
def runs() -> dict[str, tuple[train_step.Run, torch.nn.Module]]:
    found = {}
    for order in train_step.ORDERS:
        network, backbone = train_step.models(CASE, "cpu")
        samples = train_step.batch(CASE, backbone)
        step: train_step.Step = train_step.OurStep(TrainStep(network, backbone))
        if order == "released":
            step = ReleasedStep(network, backbone)
            samples = [
                replace(one, qa_pairs=(t,), task_types=("qa",))
                for one in samples
                for t in one.qa_pairs
            ]
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.0)
        found[order] = train_step.Run(step, samples, optimizer, "cpu"), network
    return found


def test_both_orders_agree(runs, tmp_path):
    row, files = {}, []
    for order, (run, network) in runs.items():
        loss, gradients = run.gradients(network)
        row[order] = {"loss": loss}
        files.append(tmp_path / order)
        torch.save(gradients, files[-1])
    found = train_step.difference(row, *files)
    assert found["loss_error"] < 1e-5 and found["gradient_error"] < 1e-4


def test_micro_batches_give_the_same_gradients(runs):
    for run, network in runs.values():
        _, whole = run.gradients(network)
        run.micro = 1
        _, parts = run.gradients(network)
        run.micro = len(run.samples)
        for name, value in whole.items():
            assert (parts[name] - value).norm() <= 1e-4 * value.norm(), name


def test_every_stage_takes_time(runs):
    for run, _ in runs.values():
        assert all(seconds > 0 for seconds in run.split().values())


def test_every_device_measures_one_prompt_per_video_beside_several():
    for names in train_step.DEFAULT.values():
        cases = [train_step.CASES[name] for name in names]
        assert {case.shape.name for case in cases if case.prompts == 1} == {
            case.shape.name for case in cases if case.prompts > 1
        }
        assert any(case.recompute for case in cases if case.prompts == 1)
        # A case with one prompt differs in nothing else from the one with several.
        for case in cases:
            several = train_step.CASES[case.name.split("-p1")[0]]
            same = {"name": several.name, "prompts": several.prompts}
            assert replace(case, **same, recompute=several.recompute) == several


def test_no_ratio_from_a_wrong_result(monkeypatch, tmp_path):
    report = {
        "loss": 1.0, "seconds": [1.0], "peak_bytes": 1,
        "splits": [dict.fromkeys(train_step.STAGES, 0.0)],
    }  # fmt: skip

    def fake(arguments, repeats, threads, timeout):
        for order, given in arguments.items():
            value = torch.ones(3) * (1 if order == "ours" else 2)
            torch.save({"weight": value}, given[given.index("--gradients") + 1])
        return {order: dict(report) for order in arguments}

    monkeypatch.setattr(train_step, "take_turns", fake)
    found = train_step.compare("tiny", "cpu", repeats=1, threads=1, compile=False)
    assert found["gradient_error"] == pytest.approx(0.5)
    assert not found["correct"] and "speedup" not in found


@pytest.mark.slow
def test_the_orders_take_turns():
    row = train_step.compare("tiny", "cpu", repeats=1, threads=1, compile=False)
    assert row["correct"] and row["speedup"] > 0
    assert all(len(row[order]["all_seconds"]) == 1 for order in train_step.ORDERS)
