"""``pytest bench/``: groups with errors and rates beside the times; no time for a wrong result."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from bench.harness import ROOT
from bench.report import report

# One baseline gives a wrong result.
BROKEN = """
from bench import ladder
right = ladder.plain_gated_projection
ladder.plain_gated_projection = lambda *inputs: 1.1 * right(*inputs)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[str, dict]:
    """What the command prints, and its record."""
    folder = tmp_path_factory.mktemp("ops")
    (folder / "sitecustomize.py").write_text(BROKEN)
    out = folder / "ops.json"
    command = [sys.executable, "-m", "pytest", "bench/", "--bench-size=tiny", "--bench-device=cpu"]
    command += ["--benchmark-max-time=0.01", f"--benchmark-json={out}"]
    # pytest-benchmark measures nothing where it takes itself for a worker of this test run.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    env["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout, json.loads(out.read_text())


def test_groups_with_errors_and_rates(run):
    _, record = run
    assert record["machine_info"].keys() >= {"device", "torch", "threads"}
    groups: dict[str, dict[str, dict]] = {}
    for result in record["benchmarks"]:
        info = result["extra_info"]
        groups.setdefault(result["group"], {})[info["variant"]] = info
        assert result["stats"]["median"] > 0 and "data" not in result["stats"]
        assert info.keys() >= {"device", "torch", "python", "commit", "command"}
        if info["variant"] != "bare":
            assert info["relative_error"] <= info["error_limit"]
    ops = {"perceiver_attention", "rank_projection", "lora_linear", "gated_projection"}
    assert {name.split()[0] for name in groups} >= ops
    assert all({"ours", "reference"} <= variants.keys() for variants in groups.values())
    linear = groups["lora_linear tiny forward+backward"]["ours"]
    assert linear["flops"] > 0 and linear["bytes"] > 0 and linear["tflop_per_second"] > 0
    page = report([record])
    assert "lora_linear tiny forward+backward" in page and record["machine_info"]["torch"] in page


def test_a_wrong_result_gets_no_time(run):
    printed, record = run
    assert "not timed" in printed and "1 failed" in printed
    timed = {
        result["extra_info"]["variant"]
        for result in record["benchmarks"]
        if result["extra_info"]["op"] == "gated_projection"
    }
    assert "plain" not in timed and {"ours", "released"} <= timed
