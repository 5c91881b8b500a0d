"""Microbenchmarks of every op against its baselines, by pytest-benchmark.

A group is one op at one shape in one direction. Its members are the variants of bench/ladder.py:
the released order, the eager definition, the best plain PyTorch, ours. Each variant is first
compared with float64; a wrong one fails and gets no time.

    pytest bench/                                        all groups, on a GPU if there is one
    pytest bench/ -k "lora_linear and 832"               some of them
    pytest bench/ --benchmark-json=bench/results/ops_cpu.json
    pytest bench/ --benchmark-autosave; pytest bench/ --benchmark-compare
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import ladder
from bench.harness import FLUSH_BYTES, WARM_UP, backend, environment

ROUNDS = 30


def _size(config: pytest.Config) -> tuple[str, str]:
    device = config.getoption("--bench-device")
    return device, config.getoption("--bench-size") or ("gpu" if device == "cuda" else "cpu")


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each variant; rows are built without data here, to list their variants."""
    device, size = _size(metafunc.config)
    with torch.device("meta"):
        rows = [make() for make in ladder.rows("meta", _dtype(device), size)]
    cases = [
        pytest.param(number, variant, id=f"{row.name.replace(' ', '-')}-{variant}")
        for number, row in enumerate(rows)
        for variant in _variants(row, device)
    ]
    metafunc.parametrize(("row", "variant"), cases, indirect=["row"], scope="module")


def _variants(row: ladder.Row, device: str) -> list[str]:
    compiled = device == "cuda" and row.compiled and "plain" in row.functions
    return [*row.functions, *["compiled"] * compiled]


@pytest.fixture(scope="module")
def row(request: pytest.FixtureRequest) -> ladder.Row:
    """One row with its data; the rows before it are freed."""
    device, size = _size(request.config)
    makers = list(ladder.rows(device, _dtype(device), size))
    return makers[request.param]()


def test_op(
    row: ladder.Row, variant: str, benchmark: BenchmarkFixture, request: pytest.FixtureRequest
) -> None:
    device, _ = _size(request.config)
    benchmark.group = row.name
    function = (row.with_compiled() if variant == "compiled" else row.functions)[variant]
    with backend("triton" if device == "cuda" else "reference"):
        bare = variant in row.bare
        error = None if bare else ladder.row_error(row, function)
        if error is not None and error > row.allowed_error:
            pytest.fail(f"relative error {error:.1e}, limit {row.allowed_error:.1e}: not timed")
        call = ladder.as_timed(row, variant, lambda: ladder.run(row, function), device)
        if device == "cuda":
            _measure_on_gpu(benchmark, call)
        else:
            benchmark(call)
    benchmark.extra_info |= {
        **_origin(device),
        "op": row.op, "shape": row.shape, "direction": row.direction, "variant": variant,
        "relative_error": error, "error_limit": None if bare else row.allowed_error,
    }  # fmt: skip
    if row.note:
        benchmark.extra_info["note"] = row.note
    if benchmark.stats is not None:
        benchmark.extra_info |= ladder.rates(row, benchmark.stats.stats.median, device)


@functools.cache
def _origin(device: str) -> dict[str, Any]:
    """Device, versions, commit and command, as in the other records of bench/."""
    names = ("device", "torch", "python", "commit", "uncommitted_changes", "command")
    record = environment(device)
    return {name: record[name] for name in names}


def _measure_on_gpu(benchmark: BenchmarkFixture, call: Callable[[], object]) -> None:
    """With a cold L2 cache, until the GPU has finished."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def cold() -> None:
        flush.zero_()
        torch.cuda.synchronize()

    def finished() -> None:
        call()
        torch.cuda.synchronize()

    benchmark.pedantic(finished, setup=cold, rounds=ROUNDS, warmup_rounds=WARM_UP)
