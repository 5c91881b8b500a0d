"""A pytest plugin that runs a share of the tests and writes a line of JSON after each of them.

``bench.runs.gpu`` starts several such processes: nearly all of the time of the kernels' tests goes
into compiling, a kernel that breaks the device takes only its own process with it, and a run that
is cut short keeps its results.

The first line has the number of tests to run; the others have name, passed, seconds and, for a
failure, the reason.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest


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

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Take turns between the files, so that every op has a first verdict early."""
        position: Counter[Path] = Counter()
        order: list[tuple[int, pytest.Item]] = []
        for item in items:
            order.append((position[item.path], item))
            position[item.path] += 1
        order.sort(key=lambda pair: pair[0])
        index, count = self.share
        items[:] = [item for _, item in order[index::count] if item.nodeid not in self.done]
        self._write({"tests": len(items)})

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
