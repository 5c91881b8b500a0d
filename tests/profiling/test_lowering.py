"""Inductor's CUDA code without a GPU: a piece of the product lowers, and more graphs are seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from profiling import lowering

CODE = '''
async_compile = AsyncCompile()
one = async_compile.triton('one', """def one(): pass""", device_str='cuda')
two = async_compile.triton('two', """def two(): pass""", device_str='cuda')
call(one, async_compile.wait(globals()))
'''


def test_kernels_of_a_module():
    assert lowering.kernel_sources(CODE) == {"one": "def one(): pass", "two": "def two(): pass"}


def test_more_graphs_and_failures_are_violations():
    recorded = lowering.PIECES["decode step"].graphs
    row = lowering.Lowered("decode step", "sm_90", graphs=recorded)
    assert row.violation is None
    more = replace(row, graphs=recorded + 1).violation
    assert more == f"decode step sm_90: {recorded + 1} graphs, recorded {recorded}"
    assert "no memory" in replace(row, failure="OSError: no memory").violation


@pytest.mark.slow
def test_a_piece_lowers_and_compiles():
    """In a process of its own: the module changes how a process sees CUDA."""
    command = [sys.executable, "-m", "profiling.lowering", "--json"]
    command += ["--piece", "decode step, adapters", "--architecture", "sm_90"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(done.stdout)["pieces"]
    assert row["graphs"] == 1 and row["kernels"] > 0 and row["failure"] is None
