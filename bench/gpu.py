"""The kernels on a GPU: are they right, how fast is each op, how long is the whole path.

Three sections, each with a share of the time, each keeping what it has when that is over:
correctness (bench/checks.py), ops against their baselines (bench/ladder.py), internalizing and
asking (bench/end_to_end.py). The record is written after every section. Exit status 1 and the
names of what failed when a check failed.

    python -m bench.gpu --out bench/results/gpu.json
    python -m bench.gpu --device cpu --quick    tries the script without a GPU, on tiny sizes
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench import checks, end_to_end, ladder
from bench.environment import environment
from bench.records import write

SECTIONS = ("checks", "micro", "end_to_end")
# Seconds from the start at which a section begins nothing more. A row started may take half a
# minute, a model of random weights another: all ends within nine.
DEADLINES = {"checks": 170, "micro": 370, "end_to_end": 450}
# Compiling a baseline takes up to a minute.
COMPILING = 60
# On a CPU nothing is left out: the tiny sizes show that all of the script runs.
CPU_SECONDS = 3600
# Processes that check at once; each holds half a GB of the GPU.
CHECKERS = 8

Record = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=list(SECTIONS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU is visible to torch; --device cpu --quick tries the script without one")
    if options.device == "cpu" and not options.quick:
        sys.exit("on a CPU only the tiny sizes of --quick end in time; add --quick")
    record: Record = {
        "benchmark": "gpu",
        **environment(options.device),
        "versions": {name: _version(name) for name in ("triton", "transformers")},
        "quick": options.quick,
        "section_seconds": {},
        "left_out": [],
        "failed": [],
        **{section: [] for section in SECTIONS},
    }
    runs: dict[str, Callable[[Record, str, bool, float], None]] = {
        "checks": _checks,
        "micro": _micro,
        "end_to_end": _end_to_end,
    }
    start = time.monotonic()
    for section in SECTIONS:
        if section not in options.only:
            continue
        began = time.monotonic()
        seconds = DEADLINES[section] if options.device == "cuda" else CPU_SECONDS
        runs[section](record, options.device, options.quick, start + seconds)
        record["section_seconds"][section] = time.monotonic() - began
        if options.out:
            write(record, options.out)
    failed = record["failed"]
    print(f"{time.monotonic() - start:.0f} s; failed: {', '.join(failed) or 'nothing'}")
    if record["left_out"]:
        print(f"not run for lack of time: {', '.join(record['left_out'])}")
    return 1 if failed else 0


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _keep(record: Record, section: str, name: str, row: Record) -> None:
    record[section].append(row)
    if not row["passed"]:
        record["failed"].append(name)
    shown = {k: v for k, v in row.items() if k not in ("name", "op", "shape", "direction")}
    print(f"{'ok    ' if row['passed'] else 'FAILED'} {name}: {json.dumps(shown)}", flush=True)


# --- sections --------------------------------------------------------------------------------


def _checks(record: Record, device: str, quick: bool, deadline: float) -> None:
    """In several processes: nearly all of the time goes into compiling some hundred kernels."""
    on_gpu = device == "cuda"
    # Without a GPU Triton interprets the kernels, which is decided when it is imported.
    variables = {} if on_gpu else {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    dtypes = [*([torch.bfloat16, torch.float32] if on_gpu else [torch.float32]), torch.float16]
    workers = min(CHECKERS, os.cpu_count() or 1)
    jobs = checks.jobs(dtypes)
    with mock.patch.dict(os.environ, variables):
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        try:
            running = {pool.submit(checks.check, job, device): job for job in jobs}
            for done in as_completed(running, timeout=max(0.0, deadline - time.monotonic())):
                # A process that dies takes with it what was not yet checked.
                row = checks.guarded(done.result)
                job = running[done]
                kept = {"name": str(job), "dtype": str(job.dtype).removeprefix("torch."), **row}
                _keep(record, "checks", str(job), kept)
        except TimeoutError:
            late = [str(job) for future, job in running.items() if not future.done()]
            record["left_out"] += late
        finally:
            pool.shutdown(cancel_futures=True)


def _micro(record: Record, device: str, quick: bool, deadline: float) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for maker in ladder.rows(device, dtype, "tiny" if quick else "gpu"):
        left = deadline - time.monotonic()
        try:
            row = maker()
        except Exception as problem:
            # One shape that does not fit costs its own row.
            reason = f"{type(problem).__name__}: {str(problem)[:160]}"
            row_record: Record = {"op": "data", "shape": "", "direction": "", "passed": False}
            row_record |= {"seconds": {}, "reason": reason}
            _keep(record, "micro", "data of a row", row_record)
            continue
        if left <= 0:
            record["left_out"].append(row.name)
        else:
            found = ladder.measure(
                row, device, 0.01 if quick else 0.15, device == "cuda" and left > COMPILING
            )
            _keep(record, "micro", row.name, found)
        del row
        if device == "cuda":
            torch.cuda.empty_cache()


def _end_to_end(record: Record, device: str, quick: bool, deadline: float) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for shape in (end_to_end.TINY,) if quick else end_to_end.SHAPES:
        name = f"end to end {shape.name}"
        if time.monotonic() > deadline:
            record["left_out"].append(name)
            continue
        try:
            row = end_to_end.measure(shape, device, dtype, 0.01 if quick else 1.0)
        except Exception as problem:
            reason = f"{type(problem).__name__}: {str(problem)[:160]}"
            row = {"shape": shape.name, "passed": False, "reason": reason}
        _keep(record, "end_to_end", name, row)
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    raise SystemExit(main())
