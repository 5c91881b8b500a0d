"""Rooflines: FLOPs and bytes of the ladder, floors from the table of peaks, right ops only."""

from __future__ import annotations

import json

import pytest
import torch

from bench import ladder
from csrc_triton.device import PEAKS
from profiling import roofline
from v2l_fast.errors import V2LError


def test_points_are_those_of_the_ladder():
    with torch.inference_mode():
        made = [make() for make in ladder.rows("cpu", torch.bfloat16, "tiny")]
    points = roofline.analytic("tiny")
    known = [(row.name, row.flops, row.bytes) for row in made if row.flops]
    assert known == [(point.name, point.flops, point.bytes) for point in points]


def test_released_shapes_take_no_memory():
    points = roofline.analytic()
    shapes = {point.shape.split()[0] for point in points}
    assert {"500M", "2.2B"} <= shapes and len(set(points)) == len(points)


def test_floor_is_the_slower_of_memory_and_compute():
    peak = PEAKS["A100"]
    bandwidth, rate = peak.reachable_bandwidth, peak.reachable_flops
    moving = roofline.Point("op", "s", "forward", flops=rate, bytes=2 * bandwidth)
    computing = roofline.Point("op", "s", "forward", flops=3 * rate, bytes=bandwidth)
    assert (moving.floor("A100"), computing.floor("A100")) == (2.0, 3.0)


def micro(**changes) -> dict:
    return {
        "op": "lora_linear", "shape": "s", "direction": "forward", "passed": True,
        "flops": 1e9, "bytes": 4.3e9, "seconds": {"ours": 2e-3, "plain": 1.0}, **changes,
    }  # fmt: skip


def record(*rows: dict, device: str = "NVIDIA H200") -> dict:
    return {"benchmark": "gpu", "device": device, "ops": list(rows)}


def test_measured_ops_that_are_right():
    wrong = micro(shape="wrong", passed=False, seconds={})
    unknown = {k: v for k, v in micro(shape="unknown").items() if k not in ("flops", "bytes")}
    card, seconds = roofline.measured(record(micro(), wrong, unknown), "gpu.json")
    ((point, taken),) = seconds.items()
    assert (card, point.shape, taken) == ("H200", "s", 2e-3)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"benchmark": "train_step"}, "gpu.json: a record of 'train_step'"),
        (record(micro(), device="some CPU"), "measured on some CPU; use a record of A100, H100"),
        (record(micro(passed=False)), "gpu.json: no op of known FLOPs passed"),
    ],
)
def test_records_without_measurements_are_refused(source, message):
    with pytest.raises(V2LError, match=message):
        roofline.measured(source, "gpu.json")


def test_one_command(tmp_path, capsys, monkeypatch):
    tiny = roofline.analytic("tiny")
    monkeypatch.setattr(roofline, "analytic", lambda: tiny)
    source, out = tmp_path / "gpu.json", tmp_path / "plots" / "roofline.png"
    assert roofline.main(["--out", str(out)]) == 0
    empty = out.read_bytes()
    assert empty.startswith(b"\x89PNG") and "measured" not in capsys.readouterr().out
    source.write_text(json.dumps(record(micro())))
    assert roofline.main([str(source), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "measured on H200" in printed and "2,000.0" in printed and "50%" in printed
    assert out.read_bytes() != empty and [p.name for p in out.parent.iterdir()] == [out.name]
    assert roofline.main([str(source), "--out", str(out), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["number"] for row in rows] == list(range(1, len(tiny) + 2))
    # 4.3 GB at 4.3 TB/s.
    assert rows[-1]["floor_seconds"]["H200"] == pytest.approx(1e-3)
    assert rows[-1]["roofline_share"] == pytest.approx(0.5)
    assert "seconds" not in rows[0]


@pytest.mark.parametrize("content", [None, "{"])
def test_a_record_that_cannot_be_read(content, tmp_path):
    source = tmp_path / "gpu.json"
    if content:
        source.write_text(content)
    with pytest.raises(SystemExit, match="gpu.json: (no such file|not JSON)") as ended:
        roofline.main([str(source), "--out", str(tmp_path / "roofline.png")])
    assert ended.value.code != 2 and not (tmp_path / "roofline.png").exists()
