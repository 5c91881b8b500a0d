"""Many requests at once: both systems answer, every token is judged, and only then times exist."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bench import models, report
from bench.models import SHAPES
from bench.runs import engine, gpu
from tests.csrc_triton.checks import register_wide_product
from tests.device import pretend
from v2l_fast.vlm.smolvlm import SmolVLM

SIZES = {"clients": 3, "new_tokens": 3, "seconds": 0.0}


def test_every_source_by_both_systems():
    record = engine.measure(SHAPES["tiny"], "cpu", **SIZES)
    assert record["passed"] and record["rounds"] == engine.ROUNDS
    prompts = record["prompt_tokens"]
    assert prompts["plain"] == prompts["adapter"] < prompts["context"]
    assert set(record["sources"]) == set(engine.SOURCES)
    for times in record["sources"].values():
        assert min(value for name in engine.SYSTEMS for value in times[name].values()) > 0
        assert times["ours"]["last_first_token"] >= times["ours"]["time_to_first_token"]
        speeds = [times[name]["tokens_per_second"] for name in engine.SYSTEMS]
        assert times["ratios"]["tokens_per_second"] == speeds[0] / speeds[1]
    page = report.report([{"benchmark": "engine_500M_cuda", **record}])
    assert "| adapter | ours |" in page and "| context | transformers |" in page


@pytest.mark.parametrize("source", ["adapter", "context"])
def test_no_times_from_a_wrong_answer(source, monkeypatch):
    """The engine answers from nothing where an adapter or a video is asked for."""
    requests = engine.Workload.requests

    def without(workload, kind):
        return requests(workload, "plain" if kind == source else kind)

    monkeypatch.setattr(engine.Workload, "requests", without)
    record = engine.measure(SHAPES["tiny"], "cpu", **SIZES)
    assert not record["passed"] and "sources" not in record
    assert record["reason"].startswith(f"tokens that are not the likeliest: {source} by ours")
    page = report.report([{"benchmark": "engine_500M_cuda", **record}])
    assert "failed: tokens that are not the likeliest" in page


def test_an_answer_that_is_too_short_is_wrong():
    workload = engine.Workload(SHAPES["tiny"], "cpu", torch.float32, 2, 3)
    with torch.no_grad():
        rival = engine.Rival(workload)
        answers = rival.answer("adapter").tokens
        assert rival.gap("adapter", answers) == 0
        assert rival.gap("adapter", [answers[0], answers[1][:-1]]) == float("inf")
        other = [*answers[1][:-1], (answers[1][-1] + 1) % 200]
        assert rival.gap("adapter", [answers[0], other]) > 1e-3


def test_questions_are_distinct_and_of_one_length():
    questions = [engine._question(number) for number in range(64)]
    assert len(set(questions)) == 64 and len({len(q.split()) for q in questions}) == 1


def test_as_on_a_gpu(monkeypatch):
    """In bfloat16, with captured graphs, on a device that reports operations of mixed devices."""
    register_wide_product()
    make = models.random_backbone

    def moved(shape, device, dtype):
        # The pretend device takes no tensors that a model creates there.
        made = make(shape, "cpu", dtype)
        return SmolVLM(made.model.to(pretend.CUDA), made.tokenizer, made.name_or_path)

    monkeypatch.setattr(models, "random_backbone", moved)
    with pretend.cuda() as device:
        record = engine.measure(SHAPES["tiny"], str(pretend.CUDA), **SIZES)
        assert record["passed"], record["reason"]
    assert device.problems == []


def test_rows_of_make_gpu():
    rows = []
    report = SimpleNamespace(
        device="cuda", quick=False, measure=lambda *row: rows.append((row[1], row[2], row[6]))
    )
    gpu.serve(report, 300.0, 310.0)
    shapes = ("500M", "2.2B")
    names = [f"serve {shape} x{count}" for count in gpu.CLIENTS for shape in shapes]
    assert [name for name, _, _ in rows] == [*names, *(f"{name} compiled" for name in names)]
    assert [end for _, end, _ in rows[4:]] == [300.0 - gpu.COMPILE_MODEL_SECONDS] * 4
    assert [count for _, _, count in rows[:4]] == [32, 32, 8, 8]
