"""``pytest bench/``: groups with what a reader needs to judge them; no time for a wrong result."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from bench.environment import ROOT
from bench.report import report

TINY = ["--bench-size=tiny", "--bench-device=cpu", "--benchmark-max-time=0.01"]


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "bench/", *TINY, *arguments]
    # pytest-benchmark measures nothing where it takes itself for a worker of this test run.
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=alone | (env or {})
    )


def test_groups_and_what_stands_beside_a_time(tmp_path):
    out = tmp_path / "ops.json"
    done = run(f"--benchmark-json={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(out.read_text())
    assert record["machine_info"].keys() >= {"device", "torch", "commit", "command", "threads"}
    groups: dict[str, dict[str, dict]] = {}
    for result in record["benchmarks"]:
        info = result["extra_info"]
        groups.setdefault(result["group"], {})[info["variant"]] = info
        assert result["stats"]["median"] > 0 and "data" not in result["stats"]
        if info["variant"] != "bare":
            assert info["relative_error"] <= info["error_limit"]
    ops = {"perceiver_attention", "rank_projection", "lora_linear", "gated_projection"}
    assert {name.split()[0] for name in groups} >= ops
    assert all({"ours", "reference"} <= variants.keys() for variants in groups.values())
    linear = groups["lora_linear tiny forward+backward"]["ours"]
    assert linear["flops"] > 0 and linear["bytes"] > 0 and linear["tflop_per_second"] > 0
    page = report([record])
    assert "lora_linear tiny forward+backward" in page and record["machine_info"]["torch"] in page


def test_a_wrong_result_gets_no_time(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import bench.plain as plain\n"
        "right = plain.gated_projection\n"
        "plain.gated_projection = lambda *inputs: 1.1 * right(*inputs)\n"
    )
    out = tmp_path / "ops.json"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = run("-k", "gated_projection", f"--benchmark-json={out}", env={"PYTHONPATH": path})
    assert done.returncode == 1 and "not timed" in done.stdout
    timed = {r["extra_info"]["variant"] for r in json.loads(out.read_text())["benchmarks"]}
    assert "plain" not in timed and {"ours", "released"} <= timed
