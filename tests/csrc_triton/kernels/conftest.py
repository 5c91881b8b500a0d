"""Runs this folder's tests in Triton's interpreter, whoever starts them.

TRITON_INTERPRET counts when a kernel is decorated, and the rest of the suite needs the compiler.
Without the variable every file here therefore becomes one test: a pytest of its own that has it.
With it the files are collected as always, which is how to pick a single test:

    TRITON_INTERPRET=1 python -m pytest tests/csrc_triton/kernels -k ragged
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


class InterpretedFile(pytest.File):
    """A test file that this process does not import."""

    def collect(self) -> Iterator[pytest.Item]:
        yield InterpretedRun.from_parent(self, name="interpreted")


class InterpretedRun(pytest.Item):
    """The whole file, run by a pytest with the interpreter; -rP shows its report."""

    class Failed(Exception):
        pass

    def runtest(self) -> None:
        # The parent's options and its place among parallel workers are not the child's.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:xdist", self.path],
            env={**inherited, "TRITON_INTERPRET": "1"},
            cwd=self.config.rootpath,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise self.Failed(f"pytest ended with status {done.returncode}:\n{done.stdout}")
        self.add_report_section("call", "interpreter", done.stdout)

    def repr_failure(self, excinfo: pytest.ExceptionInfo, style=None) -> str:
        if isinstance(excinfo.value, self.Failed):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"{self.path.name} in Triton's interpreter"


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> InterpretedFile | None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return InterpretedFile.from_parent(parent, path=module_path)
