"""Everything about a GPU in nine minutes: are the kernels right, and how fast is each part.

Six sections, the most valuable first, each with a share of the time: ``checks`` runs the tests in
tests/csrc_triton that launch kernels on the GPU; ``ops`` measures every op against its baselines
(bench/ladder.py); ``internalize``, ``answer``, ``serve`` (many requests at once) and ``train``
measure the released models' shapes with random weights, the last three also compiled where the time
suffices, as in a further run. The record is written after every row. A further run with the same
``--out``, commit and device keeps the rows that passed and continues. It needs torch, triton,
transformers and pytest, and no network; what needs another package is left out if that is not
installed.

Exit status 1 if a row failed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import ladder
from bench.harness import ROOT, argument_parser, environment, first_line
from bench.models import SHAPES
from v2l_fast.files import write_json

if TYPE_CHECKING:
    import pytest

EXAMPLES = """
  python -m bench.runs.gpu --out bench/results/gpu.json
  python -m bench.runs.gpu --only checks ops
  python -m bench.runs.gpu --device cpu --quick      a trial without a GPU, on tiny sizes"""
# Share of the time after which a section starts no further row. A row takes up to half a minute.
ENDS = {
    "checks": 0.29,
    "ops": 0.59,
    "internalize": 0.68,
    "answer": 0.76,
    "serve": 0.84,
    "train": 0.9,
}
# Tests that run at the same time; each process takes half a GB of GPU memory.
CHECKERS = 8
# Compiling a baseline takes up to a minute.
COMPILE_SECONDS = 60
# Compiling a model's passes takes up to three.
COMPILE_MODEL_SECONDS = 180
# A CPU trial has no deadline: it shows that the whole script runs.
CPU_SECONDS = 3600
# Requests at once, in the order of their rows.
CLIENTS = (32, 8)
OPTIONAL = {
    "pytest": "checks",
    "pydantic": "training steps",
    "av": "decoding beside a training step",
    "peft": "answers by PEFT and its mixed batch",
    "flash_mla": "FlashMLA's attention",
    "flash_attn_interface": "FlashAttention 3's MLA decoding",
    "flashinfer": "FlashInfer's MLA attention",
    "liger_kernel": "Liger's gated activation",
    "fla": "FLA's gated activation",
    "quack": "QuACK's gated product",
    "vllm": "vLLM's LoRA kernels",
    "punica": "Punica's LoRA kernels",
}

Row = dict[str, Any]


class GpuReport:
    """The record of a run, written after every row.

    Args:
        path: None keeps the record in memory. Rows that passed in an earlier record of the same
            commit, device and size are kept.
    """

    def __init__(self, path: Path | None, device: str, quick: bool) -> None:
        self.path, self.device, self.quick = path, device, quick
        self.record: Row = {
            "benchmark": "gpu",
            **environment(device),
            "versions": {name: _version(name) for name in ("triton", "transformers")},
            "quick": quick,
            "not_installed": [n for n in OPTIONAL if importlib.util.find_spec(n) is None],
            "section_seconds": {},
            "left_out": [],
            "failed": [],
            **{section: [] for section in ENDS},
        }
        if path is not None and path.exists():
            earlier = json.loads(path.read_text())
            same = ("benchmark", "commit", "device", "torch", "quick")
            if all(earlier.get(key) == self.record[key] for key in same):
                for section in ENDS:
                    rows = earlier.get(section, [])
                    self.record[section] = [row for row in rows if row["passed"]]

    def passed(self, section: str) -> set[str]:
        """Names of the rows of a section that passed."""
        return {row["name"] for row in self.record[section] if row["passed"]}

    def add(self, section: str, name: str, row: Row) -> None:
        row = {"name": name, **row}
        self.record[section].append(row)
        if not row["passed"]:
            self.record["failed"].append(name)
        details = {k: v for k, v in row.items() if k not in ("name", "op", "shape", "direction")}
        verdict = "ok    " if row["passed"] else "FAILED"
        print(f"{verdict} {name}: {json.dumps(details)}", flush=True)
        self.write()

    def leave_out(self, name: str) -> None:
        self.record["left_out"].append(name)

    def measure(
        self, section: str, name: str, end: float, body: Callable[..., Row], *arguments: Any
    ) -> None:
        """Add the row that ``body`` returns, unless it is there or the time is over."""
        if name in self.passed(section):
            return
        if time.monotonic() > end:
            self.leave_out(name)
            return
        try:
            row = body(*arguments)
        except subprocess.TimeoutExpired:
            self.leave_out(name)
            return
        except ModuleNotFoundError as error:
            self.leave_out(f"{name} (needs {error.name})")
            return
        except Exception as error:
            # What does not compile, launch or fit costs its own row.
            row = {"passed": False, "reason": first_line(error)}
        self.add(section, name, row)
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def write(self) -> None:
        if self.path is not None:
            write_json(self.path, self.record, allow_nan=False)


def main() -> int:
    parser = argument_parser("bench.runs.gpu", __doc__, EXAMPLES)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--only", choices=ENDS, nargs="+", default=list(ENDS), metavar="SECTION")
    parser.add_argument("--seconds", type=float, default=540, help="time of the run; default: 540")
    parser.add_argument("--out", type=Path, help="record to write, and to continue")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU is visible to torch; --device cpu --quick tries the script without one")
    if options.device == "cpu" and not options.quick:
        sys.exit("a CPU needs hours for these sizes; add --quick")
    if options.device == "cpu":
        # Small operations on several threads wait for each other.
        torch.set_num_threads(1)
    report = GpuReport(options.out, options.device, options.quick)
    for package in report.record["not_installed"]:
        print(f"{package} is not installed: {OPTIONAL[package]} left out")
    start = time.monotonic()
    total = options.seconds if options.device == "cuda" else CPU_SECONDS
    for section, run in SECTIONS.items():
        if section in options.only:
            began = time.monotonic()
            try:
                run(report, start + ENDS[section] * total, start + total)
            except ModuleNotFoundError as error:
                report.leave_out(f"{section} (needs {error.name})")
            report.record["section_seconds"][section] = time.monotonic() - began
            report.write()
    failed, left_out = report.record["failed"], report.record["left_out"]
    print(f"{time.monotonic() - start:.0f} s; failed: {', '.join(failed) or 'nothing'}")
    if left_out:
        print(f"left out: {', '.join(left_out)}; run again to continue")
    return 1 if failed else 0


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# --- a pytest plugin ------------------------------------------------------------------------------
# ``checks`` starts several pytest processes with this module as a plugin. Nearly all of the time of
# the kernels' tests goes into compiling; a kernel that breaks the device ends only its own process,
# and a run that is cut short keeps its results. A process writes one line of JSON for each test
# (name, passed, seconds, and the reason of a failure), after a first line with their number.


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--verdicts", type=Path, required=True, help="file for the lines of JSON")
    parser.addoption("--done", type=Path, required=True, help="JSON list of tests to leave out")
    parser.addoption("--share", type=int, nargs=2, default=(0, 1), help="index and number")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Verdicts(config), "verdicts-of-share")


class Verdicts:
    """The hooks of one run."""

    def __init__(self, config: pytest.Config) -> None:
        self.path = config.getoption("--verdicts")
        self.share = config.getoption("--share")
        self.done = set(json.loads(config.getoption("--done").read_text()))

    def _write(self, line: dict[str, object]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Take turns between the files, so that every op has a first verdict early."""
        position: Counter[Path] = Counter()
        order: list[tuple[int, pytest.Item]] = []
        for item in session.items:
            order.append((position[item.path], item))
            position[item.path] += 1
        order.sort(key=lambda pair: pair[0])
        index, count = self.share
        remaining = [item for _, item in order[index::count] if item.nodeid not in self.done]
        session.items[:] = remaining
        self._write({"tests": len(remaining)})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            lines = report.longreprtext.strip().splitlines()
            errors = [line[1:].strip() for line in lines if line.startswith("E ")]
            reason = (errors or lines or ["failed"])[0][:200]
            line = {"name": report.nodeid, "passed": False, "reason": reason}
        elif report.when == "call" or report.skipped:
            line = {"name": report.nodeid, "passed": True, "skipped": report.skipped}
        else:
            return
        self._write({**line, "seconds": round(report.duration, 3)})


# --- sections --------------------------------------------------------------------------------


def selected_tests(device: str) -> list[str]:
    """Arguments of pytest for the tests that launch kernels."""
    if device == "cuda":
        return ["tests/csrc_triton", "-k", "cuda"]
    # Triton's interpreter takes seconds for each test: one file is enough for a trial.
    return ["tests/csrc_triton/test_rank_projection.py", "-k", "interpreter"]


def checks(report: GpuReport, end: float, _: float) -> None:
    """The tests of csrc_triton, in several processes that report after every test."""
    if "pytest" in report.record["not_installed"]:
        return
    count = min(CHECKERS, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        done = Path(folder, "done.json")
        done.write_text(json.dumps(sorted(report.passed("checks"))))
        command = [
            sys.executable,
            "-m",
            "pytest",
            *selected_tests(report.device),
            "-p",
            "bench.runs.gpu",
        ]
        command += ["--done", str(done)]
        files = [Path(folder, f"{index}.jsonl") for index in range(count)]
        running = {
            file: subprocess.Popen(
                [*command, "--verdicts", str(file), "--share", str(index), str(count)],
                cwd=ROOT, stdout=file.with_suffix(".log").open("w"), stderr=subprocess.STDOUT,
            )
            for index, file in enumerate(files)
        }  # fmt: skip
        read: dict[Path, int] = dict.fromkeys(files, 0)
        expected: dict[Path, int] = {}
        try:
            while True:
                finished = all(process.poll() is not None for process in running.values())
                for file in files:
                    lines = file.read_text().split("\n")[:-1] if file.exists() else []
                    for line in lines[read[file] :]:
                        row = json.loads(line)
                        if "tests" in row:
                            expected[file] = row["tests"]
                        else:
                            report.add("checks", row.pop("name"), row)
                    read[file] = len(lines)
                if finished or time.monotonic() > end:
                    break
                time.sleep(0.2)
        finally:
            for process in running.values():
                process.kill()
                process.wait()
        for file, process in running.items():
            # 1: a test failed; 5: none was left to run.
            if finished and process.returncode not in (0, 1, 5):
                output = file.with_suffix(".log").read_text().strip().splitlines()[-1:]
                reason = f"pytest ended with status {process.returncode}: {''.join(output)[:200]}"
                report.add("checks", f"process {file.stem}", {"passed": False, "reason": reason})
            elif not finished:
                # Less the first line of the file, which is no test.
                rest = expected.get(file, 1) - max(0, read[file] - 1)
                report.leave_out(f"{rest} checks of process {file.stem}")


def ops(report: GpuReport, end: float, _: float) -> None:
    on_gpu = report.device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    size, seconds = ("tiny", 0.01) if report.quick else ("gpu", 0.15)

    def measure(make: Callable[[], ladder.Row]) -> Row:
        compiled = on_gpu and end - time.monotonic() > COMPILE_SECONDS
        return ladder.measure(make(), report.device, seconds, compiled)

    with torch.device("meta"):
        names = [make().name for make in ladder.rows("meta", dtype, size)]
    for name, make in zip(names, ladder.rows(report.device, dtype, size), strict=True):
        report.measure("ops", name, end, measure, make)


def _shapes(report: GpuReport) -> list[str]:
    return ["tiny"] if report.quick else ["500M", "2.2B"]


def internalize(report: GpuReport, end: float, _: float) -> None:
    from bench.runs.internalize import from_frames

    dtype = torch.bfloat16 if report.device == "cuda" else torch.float32
    seconds = 0.01 if report.quick else 1.0
    for shape in _shapes(report):
        arguments = SHAPES[shape], report.device, dtype, seconds
        report.measure("internalize", f"internalize {shape}", end, from_frames, *arguments)


def answer(report: GpuReport, end: float, _: float) -> None:
    from bench.runs.answer import measure

    new_tokens, seconds = (4, 0.01) if report.quick else (24, 0.5)
    for name, compiled, latest in _forms(report, end):
        for shape in _shapes(report):
            arguments = SHAPES[shape], report.device, new_tokens, seconds, compiled
            report.measure("answer", f"answer {shape}{name}", latest, measure, *arguments)


def serve(report: GpuReport, end: float, _: float) -> None:
    from bench.runs.engine import measure

    counts, new_tokens, seconds = ((4,), 4, 0.01) if report.quick else (CLIENTS, 24, 8.0)
    for name, compiled, latest in _forms(report, end):
        for clients in counts:
            for shape in _shapes(report):
                row = f"serve {shape} x{clients}{name}"
                arguments = SHAPES[shape], report.device, clients, new_tokens, seconds, compiled
                report.measure("serve", row, latest, measure, *arguments)


def train(report: GpuReport, end: float, latest: float) -> None:
    from bench.runs.train_step import compare

    def measure(case: str, compiled: bool) -> Row:
        left = max(1.0, latest - time.monotonic())
        row = compare(case, report.device, repeats=1, threads=1, compile=compiled, timeout=left)
        return {**row, "passed": row["correct"]}

    for name, compiled, start in _forms(report, end):
        for shape in _shapes(report):
            case = f"{shape}-p1"
            report.measure("train", f"train {case}{name}", start, measure, case, compiled)


def _forms(report: GpuReport, end: float) -> list[tuple[str, bool, float]]:
    """Without the compiler, and on a GPU also with it: the end of a row's name, whether it
    compiles, and until when it may start."""
    forms = [("", False, end)]
    if report.device == "cuda":
        forms.append((" compiled", True, end - COMPILE_MODEL_SECONDS))
    return forms


SECTIONS: dict[str, Callable[[GpuReport, float, float], None]] = {
    "checks": checks,
    "ops": ops,
    "internalize": internalize,
    "answer": answer,
    "serve": serve,
    "train": train,
}


if __name__ == "__main__":
    raise SystemExit(main())
