"""The decoder benchmark: every decoder has figures with its error, or a reason."""

from __future__ import annotations

import json
import sys

from bench import report
from bench.runs import decode
from v2l_fast.video import FrameSampling


def test_record(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "CONSECUTIVE", 30)
    monkeypatch.setattr(decode, "CASES", (("short", 24, 4), ("long", None, 4)))
    out = tmp_path / "decode.json"
    monkeypatch.setattr(
        sys, "argv", ["decode", "--height=64", "--long=40", "--rounds=1", f"--out={out}"]
    )
    assert decode.main() == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["codec"], row["frames"]) for row in rows] == [
        (codec, frames) for codec in ("vp9", "h264") for frames in (4, 4, 30)
    ]
    for row in rows:
        assert row["backends"]["pyav"]["error"] == {"mean": 0, "max": 0, "worst_block": 0}
        dali = row["backends"]["dali"]
        if row["codec"] == "vp9":
            assert dali["frames_per_second"] > 0 and dali["error"]["mean"] < 3
        else:
            assert "codec h264 on cpu" in dali["refused"]


def test_training_videos(tmp_path, monkeypatch):
    small = {"LONG_SECONDS": 4, "SPAN": (1.0, 3.0), "HEIGHT": 72, "BIT_RATE": 200_000, "TILE": 64,
             "SAMPLING": FrameSampling(4, 64)}  # fmt: skip
    for name, value in small.items():
        monkeypatch.setattr(decode, name, value)
    out = tmp_path / "training.json"
    monkeypatch.setattr(sys, "argv", ["decode", "--training", "--rounds=1", f"--out={out}"])
    assert decode.main() == 0
    record = json.loads(out.read_text())
    assert len(record["rows"]) == 3 and record["copying_cpu_seconds"] > 0
    for row in record["rows"]:
        for result in row["orders"].values():
            assert result["equal_to_ours"] and result["cpu_seconds"] > 0
    assert [row["pixel_error"] > 0 for row in record["rows"]] == [False, False, True]
    assert "| a copy of the span (v2l transcode) | seek |" in report.report([record])
