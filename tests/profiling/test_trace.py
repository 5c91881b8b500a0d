"""Profiles of every job on the tiny model: trace, ops and memory on disk and in print."""

from __future__ import annotations

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.autograd import DeviceType

from profiling import trace

TINY = ["--model", "tiny", "--frames", "1"]


@pytest.mark.parametrize(
    ("job", "ranges", "ops"),
    [
        (
            "internalize",
            {"vision": 1, "decoder layers": 1, "hypernetwork layers": 1},
            {"v2l::perceiver_attention"},
        ),
        ("ask", {"first token": 1, "further token": trace.NEW_TOKENS - 1}, {"aten::baddbmm"}),
        (
            "train",
            {"forward": 1, "backward": 1, "Optimizer.step#AdamW.step": 1},
            {f"v2l::{name}_backward" for name in ("perceiver_attention", "rank_projection",
                                                  "gated_projection", "lora_linear")},
        ),
    ],
)  # fmt: skip
def test_a_job_is_profiled(job, ranges, ops, tmp_path, capsys):
    assert trace.main([job, *TINY, "--out", str(tmp_path), "--top", "200"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"trace.json.gz", "profile.json"}
    printed = capsys.readouterr().out
    assert all(op in printed for op in ops) and str(tmp_path) in printed.replace("\n", "")
    record = json.loads((tmp_path / "profile.json").read_text())
    assert record["profile"] == job and record["model"] == "tiny" and record["frames"] == 1
    calls = {row["name"]: row["calls"] for row in record["ranges"]}
    assert calls.items() >= ranges.items()
    costs = [row["cpu_seconds"] for row in record["ops"]]
    assert costs == sorted(costs, reverse=True) and not record["kernels"]
    # The ops' own times add up to no more than the run.
    assert 0 < sum(costs) <= record["seconds"]
    with gzip.open(tmp_path / "trace.json.gz", "rt") as text:
        names = {event["name"] for event in json.load(text)["traceEvents"]}
    assert {*ops, *ranges} <= names


def test_ops_are_dispatched_as_before_after_a_profile():
    """From torch 2.15 on: past C++, but not while they are profiled."""
    ops = [op._opoverload for name, op in OPDEFS.items() if name.startswith("v2l::")]
    assert len(ops) >= 8
    before = [getattr(op, "_pyobj_dispatcher", None) is None for op in ops]
    with trace.dispatched_in_cpp():
        assert all(getattr(op, "_pyobj_dispatcher", None) is None for op in ops)
    assert [getattr(op, "_pyobj_dispatcher", None) is None for op in ops] == before


def test_memory_over_time(tmp_path):
    def call():
        first = torch.ones(1000, dtype=torch.float64)
        both = torch.cat([first, first])
        del first
        return both.sum()

    found = trace.profiled(call, "cpu", True, tmp_path)
    assert 24_000 <= found["peak_bytes"] < 25_000
    points = trace.memory_timeline(tmp_path / "trace.json.gz", "cpu")
    times, sizes = zip(*points, strict=True)
    assert list(times) == sorted(times) and sizes[:3] == (8_000, 24_000, 16_000)
    (cat,) = (row for row in found["ops"] if row["name"] == "aten::cat")
    assert cat["cpu_bytes"] == 16_000
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert not trace.memory_timeline(tmp_path / "trace.json.gz", "cuda")


def test_json_is_what_is_written(tmp_path, capsys):
    assert trace.main(["ask", *TINY, "--json", "--memory", "--out", str(tmp_path)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((tmp_path / "profile.json").read_text())
    assert record["peak_bytes"] > 0


def event(key: str, device: DeviceType, own: float, annotation: bool = False) -> SimpleNamespace:
    """As the profiler averages them, in microseconds; inclusive times are twice the own ones."""
    return SimpleNamespace(
        key=key, count=1, device_type=device, is_user_annotation=annotation,
        self_cpu_time_total=1.0, self_device_time_total=own,
        cpu_time_total=2.0, device_time_total=2 * own,
    )  # fmt: skip


def test_kernels_stand_apart_from_ops_and_ranges():
    found = trace.summary(
        [
            event("aten::mm", DeviceType.CPU, 3.0),
            event("aten::bmm", DeviceType.CPU, 5.0),
            event("gemm", DeviceType.CUDA, 8.0),
            event("vision", DeviceType.CPU, 4.0, annotation=True),
            event("vision", DeviceType.CUDA, 8.0, annotation=True),
            event("[memory]", DeviceType.CPU, 0.0),
        ],
        memory=False,
    )
    assert [row["name"] for row in found["ops"]] == ["aten::bmm", "aten::mm"]
    assert [row["name"] for row in found["kernels"]] == ["gemm"]
    (vision,) = found["ranges"]
    assert (vision["cpu_seconds"], vision["device_seconds"]) == (2e-6, 8e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "0"], "must be at least 1"),
        (["--device", "cuda"], "no GPU is visible"),
    ],
)
def test_what_cannot_work_is_said(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        trace.main(["ask", *arguments, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
