"""The decoder benchmark: every decoder has figures with its error, or a reason."""

from __future__ import annotations

import json
import sys

from bench.runs import decode


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
