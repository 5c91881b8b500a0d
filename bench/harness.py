"""What every benchmark needs: its origin, its record on disk, errors, the backend, and times."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csrc_triton.dispatch import VARIABLE
from v2l_fast.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
# Larger than the L2 cache of any GPU here (H200: 50 MB). The other layers of a decoder evict a
# layer's weights between two tokens, so a warm cache would flatter memory-bound calls.
FLUSH_BYTES = 256 * 2**20
WARM_UP = 2
# The project's goals by part of the GPU's name, then by shape: at most these seconds and bytes, at
# least these shares. Those of an A100 are the H200's, times the ratio of the cards' peaks: 3.2 in
# FLOP/s for internalizing, 2.4 in bytes/s for the first token.
_HOPPER = {"weight_floor_share": 0.5, "internalize_12_seconds": 0.1}
_AMPERE = {"weight_floor_share": 0.5, "internalize_12_seconds": 0.32}
_ON_HOPPER = {
    "500M": {"time_to_first_token": 3e-3, "internalize_1024_bytes": 24e9, **_HOPPER},
    "2.2B": {"time_to_first_token": 5e-3, **_HOPPER},
}
TARGETS: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "H200": _ON_HOPPER,
    "H100": _ON_HOPPER,
    "A100": {
        "500M": {"time_to_first_token": 7.2e-3, "internalize_1024_bytes": 24e9, **_AMPERE},
        "2.2B": {"time_to_first_token": 12e-3, **_AMPERE},
    },
}

Call = Callable[[], object]


def argument_parser(module: str, description: str, examples: str) -> argparse.ArgumentParser:
    """The parser of ``python -m module``; its help shows both texts as they are."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        epilog=f"examples:\n{examples.strip(chr(10))}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


# --- records --------------------------------------------------------------------------------------


def environment(device: str = "cpu") -> dict[str, Any]:
    """Command, commit, device and versions of this process."""
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else _processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _git(*arguments: str) -> str | None:
    """The output of git; None without git or outside a repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def write_record(record: Mapping[str, Any], path: Path) -> None:
    """Write a record and print where.

    Raises:
        ValueError: the record holds a number that is not finite.
    """
    write_json(path, record, allow_nan=False)
    print(f"written to {path}")


def run_module(
    module: str, arguments: list[str], threads: int, timeout: float | None = None
) -> dict[str, Any]:
    """Run ``python -m module`` and return the JSON object on the last line of its output.

    A process of its own has a peak memory of its own.

    Raises:
        subprocess.TimeoutExpired: it took longer than ``timeout`` seconds.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments, "--threads", str(threads)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        cwd=ROOT,
        timeout=timeout,
    )
    return json.loads(done.stdout.splitlines()[-1])


def module_process(module: str, arguments: list[str], threads: int) -> subprocess.Popen[str]:
    """``python -m module`` with pipes to its standard input and output."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments, "--threads", str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        cwd=ROOT,
    )


def peak_bytes(device: str = "cpu") -> int:
    """Peak memory of this process so far; on a GPU, allocated since the last reset."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def first_line(error: Exception) -> str:
    """An error on one line of a table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = (str(error).strip() or repr(error)).splitlines()[0]
    return f"{type(error).__name__}: {text}"[:160]


# --- correctness ----------------------------------------------------------------------------------


def error_limit(dtype: torch.dtype) -> float:
    """Allowed relative error (Frobenius norm) of two chained products in a dtype.

    Half precision rounds one intermediate and the result; a float32 sum of some hundred terms
    loses a few bits. A structural error is 0.2 or more.
    """
    return (64 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of ``expected``; inf for non-finite values."""
    if not torch.isfinite(actual).all():
        return math.inf
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def json_number(value: float) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Set ``V2L_BACKEND`` to ``name`` inside the block. Not thread-safe."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


# --- times ----------------------------------------------------------------------------------------


def median_seconds(
    calls: Mapping[str, Call], device: str, seconds: float = 0.5, most: int = 50, least: int = 3
) -> dict[str, float]:
    """Median GPU (by events, with a cold L2 cache) or CPU (by the clock) time of each call.

    The calls take turns, so that all of them meet the same disturbances.

    Args:
        seconds: time to spend on each call, within ``least`` to ``most`` repetitions.
    """
    if device != "cuda":
        return _take_turns(calls, _clock, seconds, most, least)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def events(call: Call) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        # Filling takes longer than enqueuing most calls: the events then see GPU time alone.
        flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return _take_turns(calls, events, seconds, most, least)


def median_latency(
    calls: Mapping[str, Call],
    device: str,
    seconds: float = 0.5,
    most: int = 30,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median time of each call until the device has finished, as a caller sees it.

    Args:
        clock: ``time.process_time`` counts CPU seconds instead, which other load on the machine
            changes less.
    """

    def finished(call: Call) -> float:
        start = clock()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    return _take_turns(calls, finished, seconds, most)


def _clock(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _take_turns(
    calls: Mapping[str, Call],
    measure: Callable[[Call], float],
    seconds: float,
    most: int,
    least: int = 3,
) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(WARM_UP):
            measure(call)
    remaining = set(calls)
    while remaining:
        for name in [name for name in calls if name in remaining]:
            durations = times[name]
            durations.append(measure(calls[name]))
            if len(durations) >= most or (len(durations) >= least and sum(durations) >= seconds):
                remaining.discard(name)
    return {name: statistics.median(durations) for name, durations in times.items()}


def captured(call: Call) -> Call:
    """The call as a CUDA graph, replayed: GPU time without launches from Python."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
