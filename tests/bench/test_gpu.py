"""``make gpu`` without a GPU: the script on tiny sizes; it resumes, and names what failed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from bench import ladder
from bench.harness import ROOT
from bench.report import report
from bench.runs import gpu
from csrc_triton import perceiver_attention
from tests.waiting import LIMIT


@pytest.mark.slow
def test_whole_script(tmp_path):
    """With one missing package named, and a second run that has nothing left to do."""
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "bench.runs.gpu", "--device", "cpu", "--quick", "--out", out]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    record = json.loads(out.read_text())
    assert record["failed"] == record["left_out"] == []
    assert all(record[section] for section in gpu.SECTIONS)
    ops = {"perceiver_attention", "rank_projection", "lora_linear", "gated_projection"}
    assert {row["op"] for row in record["ops"]} >= ops
    assert "### A training step: train tiny-p1" in report([record])
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "ok    " not in again.stdout
    assert json.loads(out.read_text())["ops"] == record["ops"]


def test_needs_a_gpu_or_quick(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, message in (([], "no GPU"), (["--device", "cpu"], "add --quick")):
        monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
        with pytest.raises(SystemExit, match=message):
            gpu.main()


# --- checks ---------------------------------------------------------------------------------------

TESTS = {
    "test_one.py": """
import pytest
def test_right(): pass
def test_wrong(): assert 1 + 1 == 3
@pytest.mark.skip(reason="needs a GPU")
def test_skipped(): pass
""",
    "test_two.py": "def test_first(): pass",
}


@pytest.fixture
def checks(tmp_path, monkeypatch):
    """Runs the section on tests of our own, in one process; returns its report."""
    folder = tmp_path / "tests"
    folder.mkdir()
    for name, text in TESTS.items():
        (folder / name).write_text(text)
    monkeypatch.setattr(gpu, "selected_tests", lambda device: [str(folder)])
    monkeypatch.setattr(gpu, "CHECKERS", 1)

    def run(end: float = LIMIT, **files: str) -> gpu.GpuReport:
        for name, text in files.items():
            (folder / f"{name}.py").write_text(text)
        report = gpu.GpuReport(tmp_path / "gpu.json", "cpu", quick=False)
        gpu.checks(report, time.monotonic() + end, 0.0)
        return report

    return run


def names(rows: list[dict]) -> list[str]:
    return [row["name"].rpartition("::")[2] for row in rows]


def test_every_test_is_a_row_and_files_take_turns(checks):
    record = checks().record
    assert names(record["checks"]) == ["test_right", "test_first", "test_wrong", "test_skipped"]
    wrong = record["checks"][2]
    assert record["failed"] == [wrong["name"]]
    assert not wrong["passed"] and wrong["reason"] == "assert (1 + 1) == 3"


def test_a_second_run_repeats_what_failed(checks):
    checks()
    record = checks(test_one=TESTS["test_one.py"].replace("== 3", "== 2")).record
    assert names(record["checks"]) == ["test_right", "test_first", "test_skipped", "test_wrong"]
    assert not record["failed"] and all(row["passed"] for row in record["checks"])


def test_a_run_of_another_commit_starts_anew(tmp_path, monkeypatch):
    for commit, kept in (("one", 0), ("one", 1), ("two", 0)):
        monkeypatch.setattr(
            gpu, "environment", lambda _, c=commit: {"commit": c, "device": "a", "torch": "b"}
        )
        report = gpu.GpuReport(tmp_path / "gpu.json", "cpu", quick=True)
        assert len(report.record["ops"]) == kept
        report.add("ops", "right", {"passed": True})
        report.add("ops", "wrong", {"passed": False})


def test_a_process_that_dies_keeps_its_verdicts(checks):
    record = checks(test_two="import os\ndef test_a(): pass\ndef test_b(): os._exit(3)").record
    assert names(record["checks"])[:2] == ["test_right", "test_a"]
    assert not record["checks"][-1]["passed"]
    assert "pytest ended with status 3" in record["checks"][-1]["reason"]


def test_tests_that_come_too_late_are_counted(checks):
    # The second test never ends; the deadline is that the first one has.
    text = "import time\ndef test_a(): pass\ndef test_b(): time.sleep(10_000)"
    report = gpu.GpuReport.add

    def add(self, section, name, row):
        report(self, section, name, row)
        raise TimeoutError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(TimeoutError):
        patch.setattr(gpu.GpuReport, "add", add)
        checks(test_one="", test_two=text)
    record = checks(end=-1.0).record
    assert names(record["checks"]) == ["test_a"] and record["left_out"]


def test_without_pytest_the_checks_are_left_out(checks, monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    record = checks().record
    assert record["not_installed"] == list(gpu.OPTIONAL) and not record["checks"]


# --- rows -----------------------------------------------------------------------------------------


def test_a_row_that_raises_fails_alone(tmp_path):
    report = gpu.GpuReport(tmp_path / "gpu.json", "cpu", quick=True)
    end = time.monotonic() + LIMIT

    def broken():
        raise RuntimeError("out of shared memory\nmore")

    def incomplete():
        raise ModuleNotFoundError("No module named 'av'", name="av")

    report.measure("ops", "broken", end, broken)
    report.measure("ops", "incomplete", end, incomplete)
    report.measure("ops", "right", end, lambda: {"passed": True})
    report.measure("ops", "late", 0.0, lambda: {"passed": True})
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["ops"] == [
        {"name": "broken", "passed": False, "reason": "RuntimeError: out of shared memory"},
        {"name": "right", "passed": True},
    ]
    assert record["failed"] == ["broken"] and report.record["left_out"] == [
        "incomplete (needs av)",
        "late",
    ]


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
    record = ladder.measure(row, "cpu", 0.0, False)
    assert not record["passed"] and not record["seconds"] and "speedups" not in record


def test_a_baseline_that_raises_is_an_entry_of_its_row():
    row = attention_row(perceiver_attention)

    def broken(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    row.functions = {**row.functions, "released": broken}
    record = ladder.measure(row, "cpu", 0.0, False)
    assert record["passed"] and record["failures"] == {"released": "out of memory"}
    assert set(record["speedups"]) == {"reference"}


@pytest.mark.parametrize("section", ["answer", "train"])
def test_compiled_rows_come_last_and_need_time(section):
    rows = []
    report = SimpleNamespace(
        device="cuda", quick=False, measure=lambda *row: rows.append((row[1], row[2], row[-1]))
    )
    gpu.SECTIONS[section](report, 300.0, 310.0)
    names = [name for name, _, _ in rows]
    assert names[2:] == [f"{name} compiled" for name in names[:2]] and len(names) == 4
    assert [end for _, end, _ in rows] == [300.0] * 2 + [300.0 - gpu.COMPILE_MODEL_SECONDS] * 2
    assert [compiled for _, _, compiled in rows] == [False] * 2 + [True] * 2
    report.device = "cpu"
    rows.clear()
    gpu.SECTIONS[section](report, 300.0, 310.0)
    assert len(rows) == 2
