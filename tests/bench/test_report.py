"""The page written from records: every record's origin, failures named, no claims on them."""

from __future__ import annotations

import copy
import json
import sys

import pytest

from bench import report
from bench.records import RESULTS, write

ORIGIN = {
    "command": "python -m bench.x",
    "commit": "0123456789abcdef",
    "uncommitted_changes": False,
    "device": "a processor",
    "torch": "2.13.0",
    "python": "3.11.7",
}
ROW = {
    "direction": "forward", "examples": 8, "tokens": 1, "adapters": 2, "relative_error": 1e-7,
    "correct": True, "released_seconds": 0.004, "ours_seconds": 0.002, "seconds_ratio": 0.5,
}  # fmt: skip
CPU = {
    "benchmark": "lora_linear_cpu", **ORIGIN, "threads": 2,
    "shape": {"d_in": 2560, "d_out": 960, "rank": 32}, "rows": [ROW],
}  # fmt: skip
MICRO = {
    "op": "lora_linear", "shape": "500M", "direction": "forward", "error": 1e-3, "limit": 1e-2,
    "passed": True, "seconds": {"ours": 1e-5, "released": 4e-5},
    "failures": {"compiled": "out of memory"}, "speedups": {"released": 4.0},
    "gb_per_second": 100.0, "tflop_per_second": 2.0, "roofline_share": 0.25,
}  # fmt: skip
END = {
    "shape": "500M", "passed": True, "error": 1e-2, "context_tokens": 900,
    "variants": {"triton": {"vision": 0.5}, "reference": {"vision": 0.75}},
}  # fmt: skip
GPU = {
    "benchmark": "gpu", **ORIGIN, "versions": {"triton": "3.6.0"}, "failed": [], "left_out": [],
    "checks": [{"name": "rank_projection", "dtype": "float16", "error": 1e-4, "limit": 1e-3,
                "repeatable": True, "passed": True}],
    "micro": [MICRO], "end_to_end": [END],
}  # fmt: skip


def test_cpu_row_and_origin():
    page = report.report([CPU])
    assert "a processor, threads: 2; torch 2.13.0, Python 3.11.7; commit 0123456789" in page
    assert "`python -m bench.x`" in page
    assert "| forward | 8 | 1 | 2 | 4.00 | 2.00 | 0.500 | 1.0e-07 |" in page


def test_no_ratio_on_a_wrong_row():
    wrong = {**CPU, "rows": [{**ROW, "correct": False}]}
    page = report.report([wrong])
    assert "0.500" not in page and "| failed |" in page


def test_gpu_page():
    page = report.report([GPU])
    assert "1 of 1 checks passed" in page and "triton 3.6.0" in page
    assert "| 10.0 | 40.0 (4.00x) | 100 | 2.0 | 25% |" in page
    assert "| vision | 500.00 | 750.00 |" in page


def test_failures_are_named_and_claim_nothing():
    record = copy.deepcopy(GPU)
    record["failed"], record["left_out"] = ["lora_linear 500M forward"], ["end to end 2.2B"]
    record["micro"][0]["passed"] = False
    record["end_to_end"][0] |= {"passed": False, "reason": "not finite"}
    page = report.report([record])
    assert "Failed: `lora_linear 500M forward`" in page
    assert "Not run for lack of time: end to end 2.2B" in page
    assert "4.00x" not in page and "25%" not in page
    assert "500M: failed (not finite)" in page and "500.00" not in page


def test_unknown_benchmark_shows_its_rows():
    page = report.report([{"benchmark": "other", **ORIGIN, "rows": [{"a": 1}, {"b": 2}]}])
    assert "## other" in page and "| 1 |  |" in page


def test_committed_records_can_be_read():
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    assert records and report.report(records).count("## ") >= len(records)


def test_written_whole(tmp_path, monkeypatch):
    write(CPU, tmp_path / "results" / "one.json")
    out = tmp_path / "RESULTS.md"
    arguments = ["report", "--results", str(tmp_path / "results"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    report.main()
    assert out.read_text() == report.report([CPU])
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["one.json"]


def test_a_record_with_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError):
        write({"error": float("nan")}, tmp_path / "one.json")
    assert not (tmp_path / "one.json").exists()
