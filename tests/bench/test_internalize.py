"""From a file or frames to an adapter: the rows of that benchmark, and its targets."""

from __future__ import annotations

import torch

from bench.models import SHAPES
from bench.runs import internalize
from bench.runs.answer import judge


def test_from_a_file_to_an_adapter(monkeypatch):
    monkeypatch.setattr(internalize, "FILE_FRAMES", (3, 15))
    monkeypatch.setattr(internalize, "HEIGHT", 64)
    found = internalize.from_files(SHAPES["tiny"], "cpu", torch.float32, 0.01, compile=False)
    assert found["passed"] and found["decoder"] == "pyav" and not found["decoder_fallbacks"]
    few, many = found["rows"]
    assert (few["frames"], many["frames"]) == (3, 15)
    # The rest of the prompt has the same length for any number of frames.
    assert (many["context_tokens"] - few["context_tokens"]) % 12 == 0
    assert all(min(row["internalize_seconds"], row["decode_seconds"]) > 0 for row in found["rows"])


def test_every_stage_from_frames():
    found = internalize.from_frames(SHAPES["tiny"], "cpu", torch.float32, 0.0)
    assert found["passed"] and found["error"] <= found["limit"]
    assert found["variants"].keys() == {"released", "reference"}
    stages = found["variants"]["reference"]
    assert stages.keys() == {"vision", "decoder and hypernetwork", "internalize"}
    assert min(stages.values()) > 0


def test_targets_are_those_of_the_gpu_and_shape():
    ways = {"adapter": {"time_to_first_token": 2e-3, "weight_floor_share": 0.4}}
    rows = [
        {"frames": 12, "internalize_seconds": 0.2, "device_bytes": 9e9},
        {"frames": 1024, "internalize_seconds": 3.0, "device_bytes": 20e9},
    ]
    answers = {"device": "NVIDIA H200", "shape": "500M", "ways": ways}
    assert {name: t["met"] for name, t in judge(answers).items()} == {
        "time_to_first_token": True, "weight_floor_share": False,
    }  # fmt: skip
    videos = {"device": "NVIDIA H200", "shape": "500M", "rows": rows}
    assert {name: t["met"] for name, t in judge(videos).items()} == {
        "internalize_12_seconds": False, "internalize_1024_bytes": True,
    }  # fmt: skip
    assert judge(videos | {"device": "AMD EPYC"}) == {} == judge(videos | {"shape": "tiny"})
