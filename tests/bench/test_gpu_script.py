"""``make gpu`` without a GPU: the whole script on tiny sizes, and that it claims nothing wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

from bench import checks, gpu, ladder
from bench.environment import ROOT
from bench.report import report
from csrc_triton import perceiver_attention
from tests.waiting import LIMIT


def test_whole_script(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(out.read_text())
    assert record["failed"] == record["left_out"] == []
    assert record["micro"] and record["end_to_end"]
    names = {row["name"].split()[0] for row in record["checks"]}
    ops = {"perceiver_attention", "rank_projection", "lora_linear", "gated_projection"}
    assert names == {*ops, "canary"}
    assert {row["op"] for row in record["micro"]} >= ops
    assert all(row["repeatable"] for row in record["checks"] if "repeatable" in row)
    assert "End to end" in report([record])


@pytest.fixture
def record(monkeypatch) -> dict:
    """Of a run whose only check is of a case that does not exist."""
    monkeypatch.setattr(gpu, "CHECKERS", 1)
    monkeypatch.setattr(checks, "jobs", lambda dtypes: [checks.Job("nothing", torch.float16)])
    return {"checks": [], "failed": [], "left_out": []}


def test_a_failed_check_is_named(record):
    gpu._checks(record, "cpu", True, time.monotonic() + LIMIT)
    assert record["failed"] == ["nothing float16"] and not record["left_out"]
    (row,) = record["checks"]
    assert row["name"] == "nothing" and row["dtype"] == "float16"
    assert not row["passed"] and row["reason"].startswith("KeyError")


def test_checks_that_come_too_late_are_named(record):
    gpu._checks(record, "cpu", True, time.monotonic())
    assert record == {"checks": [], "failed": [], "left_out": ["nothing float16"]}


def test_needs_a_gpu_or_quick(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, message in (([], "no GPU"), (["--device", "cpu"], "add --quick")):
        monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
        with pytest.raises(SystemExit, match=message):
            gpu.main()


def attention_row(ours) -> ladder.Row:
    generator = torch.Generator().manual_seed(0)
    query, context = (torch.randn(2, n, 16, generator=generator) for n in (4, 9))
    functions = {"reference": perceiver_attention, "ours": ours}
    inputs = [query, context, torch.ones(2, 9)]
    return ladder.Row("op", "shape", functions, inputs, flops=1, bytes=1)


def test_no_speedup_and_no_time_from_a_wrong_result():
    def wrong(query, context, inv_rms):
        out, lse = perceiver_attention(query, context, inv_rms)
        return out * 1.1, lse

    row = attention_row(wrong)
    row.oracle = perceiver_attention
    found = ladder.measure(row, "cpu", 0.0, False)
    assert not found["passed"] and not found["seconds"] and "speedups" not in found


def test_a_baseline_that_breaks_costs_its_own_column():
    row = attention_row(perceiver_attention)

    def broken(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    row.functions = {**row.functions, "released": broken}
    found = ladder.measure(row, "cpu", 0.0, False)
    assert found["passed"] and found["failures"] == {"released": "out of memory"}
    assert set(found["speedups"]) == {"reference"}


def test_a_check_that_breaks_fails_alone():
    def broken():
        raise RuntimeError("out of shared memory\nmore")

    row = checks.guarded(broken)
    assert not row["passed"] and row["reason"] == "RuntimeError: out of shared memory"


def test_errors_see_what_is_not_finite():
    found, wanted = torch.tensor([1.0, float("nan")]), torch.ones(2)
    assert checks.json_number(checks.relative_error(found, wanted)) is None
    assert checks.largest_error(torch.tensor([1.0, 3.0]), wanted) == 2.0


def test_memory_is_poisoned_inside_only():
    with checks.poisoned():
        assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(2).isnan().all()
    assert torch.empty is not None and not hasattr(torch.empty, "__wrapped__")
    assert not torch.zeros(3).isnan().any()
