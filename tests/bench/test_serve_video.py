"""From a file to an adapter: the rows of that benchmark, and what its targets are held against."""

from __future__ import annotations

import torch

from bench import serve_video
from bench.end_to_end import TINY
from bench.serve_targets import judged


def test_from_a_file_to_an_adapter(monkeypatch):
    monkeypatch.setattr(serve_video, "FRAMES", (3, 15))
    monkeypatch.setattr(serve_video, "HEIGHT", 64)
    found = serve_video.measure(TINY, "cpu", torch.float32, 0.01, compile=False)
    assert found["passed"] and found["decoder"] == "pyav" and not found["decoder_fallbacks"]
    few, many = found["rows"]
    assert (few["frames"], many["frames"]) == (3, 15)
    # The rest of the prompt is as long for any number of frames.
    assert (many["context_tokens"] - few["context_tokens"]) % 12 == 0
    assert all(row["internalize_seconds"] > row["decode_seconds"] > 0 for row in found["rows"])


def test_targets_are_those_of_the_gpu_and_shape():
    ways = {"adapter": {"time_to_first_token": 2e-3, "weight_floor_share": 0.4}}
    rows = [
        {"frames": 12, "internalize_seconds": 0.2, "device_bytes": 9e9},
        {"frames": 1024, "internalize_seconds": 3.0, "device_bytes": 20e9},
    ]
    asked = {"device": "NVIDIA H200", "shape": "500M", "ways": ways}
    assert {name: t["met"] for name, t in judged(asked).items()} == {
        "time_to_first_token": True, "weight_floor_share": False,
    }  # fmt: skip
    videos = {"device": "NVIDIA H200", "shape": "500M", "rows": rows}
    assert {name: t["met"] for name, t in judged(videos).items()} == {
        "internalize_12_seconds": False, "internalize_1024_bytes": True,
    }  # fmt: skip
    assert judged(videos | {"device": "AMD EPYC"}) == {} == judged(videos | {"shape": "tiny"})
