"""Options of the microbenchmarks, and what their record says about where they ran.

pytest-benchmark times and compares; bench/ladder.py has what is timed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import ladder
from bench.harness import environment


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("v2l_fast microbenchmarks")
    group.addoption(
        "--bench-device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available()
        else "cpu", help="Device to measure on. Default: cuda if there is a GPU.",
    )  # fmt: skip
    group.addoption(
        "--bench-size", choices=ladder.SIZES, default=None,
        help="Shapes: tiny (a trial), cpu (seconds on a CPU) or gpu (fill a GPU). "
        "Default: depends on the device.",
    )  # fmt: skip
    group.addoption(
        "--bench-threads", type=int, default=1, metavar="N",
        help="CPU threads. Default: 1, since with a thread on every core other load on the machine "
        "delays short operations.",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--bench-threads"))
    # Few columns fit a terminal; outliers do not move the median.
    config.option.benchmark_columns = ["median", "iqr", "rounds"]


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """Where it ran: what two records must share so that --benchmark-compare does not warn."""
    machine = environment(config.getoption("--bench-device"))
    for varies in ("command", "commit", "uncommitted_changes"):
        del machine[varies]
    return machine | {"threads": torch.get_num_threads()}


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Name the record for bench/report.py, and leave out single times."""
    output_json["benchmark"] = "ops"
    for result in output_json["benchmarks"]:
        result["stats"].pop("data", None)
