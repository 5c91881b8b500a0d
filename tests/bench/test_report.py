"""The page written from records: where each was measured, and no ratio for a wrong result."""

from __future__ import annotations

import copy
import json
import re
import sys

from bench import report
from bench.harness import RESULTS, write_record

ORIGIN = {
    "command": "python -m bench.x",
    "commit": "0123456789abcdef",
    "uncommitted_changes": False,
    "device": "a processor",
    "torch": "2.13.0",
    "python": "3.11.7",
}


def timed(variant: str, seconds: float) -> dict:
    info = {"variant": variant, "relative_error": 1e-7, "error_limit": 1e-5}
    return {"group": "lora_linear 500M", "stats": {"median": seconds}, "extra_info": info}


OPS = {
    "benchmark": "ops", "machine_info": {**ORIGIN, "threads": 2},
    "benchmarks": [timed("released", 0.004), timed("ours", 0.002)],
}  # fmt: skip
OP = {
    "name": "lora_linear 500M forward", "error": 1e-3, "limit": 1e-2,
    "passed": True, "seconds": {"ours": 1e-5, "released": 4e-5},
    "failures": {"compiled": "out of memory"}, "speedups": {"released": 4.0},
    "gb_per_second": 100.0, "tflop_per_second": 2.0, "roofline_share": 0.25,
}  # fmt: skip
INTERNALIZE = {
    "name": "internalize 500M", "passed": True, "error": 1e-2, "context_tokens": 900,
    "variants": {"triton": {"vision": 0.5}, "reference": {"vision": 0.75}},
}  # fmt: skip
GPU = {
    "benchmark": "gpu", **ORIGIN, "versions": {"triton": "3.6.0"}, "failed": [], "left_out": [],
    "checks": [{"name": "test_op", "passed": True, "seconds": 1.0}],
    "ops": [OP], "internalize": [INTERNALIZE], "answer": [], "train": [],
}  # fmt: skip


def test_a_group_of_pytest_benchmark_and_its_origin():
    page = report.report([OPS])
    assert "a processor, threads: 2; torch 2.13.0, Python 3.11.7; commit 0123456789" in page
    assert "`python -m bench.x`" in page
    assert "| lora_linear 500M | 2.00 | 4.00 (2.00x) |  | 1.0e-07 |" in page


def test_no_ratio_to_a_wrong_result():
    page = report.report([{**OPS, "benchmarks": OPS["benchmarks"][:1]}])
    assert "2.00x" not in page and "| lora_linear 500M | failed | 4.00 |" in page


def test_gpu_page():
    page = report.report([GPU])
    assert "1 of 1 checks passed" in page and "triton 3.6.0" in page
    assert "| 10.0 | 40.0 (4.00x) | 100 | 2.0 | 25% |" in page
    assert "| vision | 500.00 | 750.00 |" in page


def test_failures_are_named_and_claim_nothing():
    record = copy.deepcopy(GPU)
    record["failed"], record["left_out"] = ["lora_linear 500M forward"], ["train 2.2B-p1"]
    record["ops"][0]["passed"] = False
    record["internalize"][0] |= {"passed": False, "reason": "not finite"}
    page = report.report([record])
    assert "Failed: `lora_linear 500M forward`" in page
    assert "Left out: train 2.2B-p1" in page
    assert "4.00x" not in page and "25%" not in page
    assert "failed (not finite)" in page and "500.00" not in page


def test_unknown_benchmark_shows_its_rows():
    page = report.report([{"benchmark": "other", **ORIGIN, "rows": [{"a": 1}, {"b": 2}]}])
    assert "## other" in page and "| 1 |  |" in page


def test_committed_records_can_be_read():
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    assert records and report.report(records).count("## ") >= len(records)


def test_committed_records_name_no_folder_of_a_machine():
    root = RESULTS.parents[1]
    paths = [*RESULTS.glob("*.json"), *(root / "runs").glob("*.json")]
    assert len(paths) > 10
    assert not [path.name for path in paths if re.search(r'"/[A-Za-z]', path.read_text())]


def test_written_whole(tmp_path, monkeypatch):
    write_record(OPS, tmp_path / "results" / "one.json")
    out = tmp_path / "RESULTS.md"
    arguments = ["report", "--results", str(tmp_path / "results"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    report.main()
    assert out.read_text() == report.report([OPS])
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["one.json"]
