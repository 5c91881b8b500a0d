"""Options of the microbenchmarks, and where and with what they were measured.

pytest-benchmark times and compares; what is timed stands in bench/ladder.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import ladder
from bench.environment import environment


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("v2l_fast microbenchmarks")
    group.addoption(
        "--bench-device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available()
        else "cpu", help="Device to measure on. Default: cuda where there is a GPU.",
    )  # fmt: skip
    group.addoption(
        "--bench-size", choices=ladder.SIZES, default=None,
        help="Shapes: tiny (a trial), cpu (seconds on a CPU) or gpu (fill a GPU). "
        "Default: by device.",
    )  # fmt: skip
    group.addoption(
        "--bench-threads", type=int, default=1, metavar="N",
        help="CPU threads. One is the default: with as many threads as cores, short operations "
        "wait for each other whenever anything else runs.",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--bench-threads"))
    # The table fits a terminal: medians, which outliers do not move, and their spread.
    config.option.benchmark_columns = ["median", "iqr", "rounds"]


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """Device, versions, commit and command, as in every other record of bench/."""
    return environment(config.getoption("--bench-device")) | {"threads": torch.get_num_threads()}


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Name the record as bench/report.py knows it; single times stay out of it."""
    output_json["benchmark"] = "ops"
    for result in output_json["benchmarks"]:
        result["stats"].pop("data", None)
