"""A video file internalized as a server does it: decoded, resized, vision tower, adapter.

H.264 files made on the fly, random weights of a released shape. Seconds from the file to the
adapter, those of decoding alone, and what the GPU's memory holds after it; checked is that every
frame is there and the adapter finite.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.decode import FPS, LIMITS, make
from bench.end_to_end import FRAMES as PROMPT_FRAMES
from bench.end_to_end import INSTRUCTION_TOKENS, INTRODUCTION_TOKENS, Shape, _Bench
from bench.timing import together
from v2l_fast.hypernet.adapter import AdapterBatch
from v2l_fast.video import Clip, load_video
from v2l_fast.video.fallbacks import fallbacks
from v2l_fast.video.preprocess import frame_views
from v2l_fast.video.reading import resolved

FRAMES = (12, 1024)
HEIGHT = 720


def measure(
    shape: Shape, device: str, dtype: torch.dtype, seconds: float, compile: bool
) -> dict[str, Any]:
    """A row for each number of frames; ``seconds`` to spend on each time."""
    fallbacks.clear()
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        bench = _Bench(shape, device, dtype)
        if compile:
            bench.backbone.compile()
            bench.network.compile_layers()
        rows = []
        for count in FRAMES:
            path = make(Path(folder) / f"{count}.mp4", "h264", max(count, 10 * FPS), HEIGHT)
            rows.append(_row(bench, path, count, seconds))
    return {
        "longest_edge": shape.longest_edge, "height": HEIGHT, "decoder": resolved("auto", device),
        "decoder_fallbacks": fallbacks.reasons(), "rows": rows,
        "passed": all(row["passed"] for row in rows),
    }  # fmt: skip


def _row(bench: _Bench, path: Path, count: int, seconds: float) -> dict[str, Any]:
    ids, device = _context(bench.context_ids, count), bench.device

    def decode() -> Clip:
        options = {"limits": LIMITS, "longest_edge": bench.edge, "device": device}
        return load_video(path, count, exact_frames=True, **options)

    def internalize() -> AdapterBatch:
        views = frame_views(decode().frames, bench.edge, bench.backbone.tile_size).views
        inputs = bench.backbone.embed(ids, bench.backbone.encode_views(views)).embeddings[None]
        hidden = bench.backbone.decoder.layer_inputs(inputs)
        return bench.network.assemble([bench.network.layer(i, h) for i, h in enumerate(hidden)])

    def finished(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    frames = len(decode().frames)
    if device == "cuda":
        torch.cuda.empty_cache()
    made = internalize()
    row = {
        "frames": frames, "context_tokens": len(ids),
        "passed": frames == count
        and all(bool(f.isfinite().all()) for s in (made.A, made.B) for f in s.values()),
    }  # fmt: skip
    if device == "cuda":
        # PyTorch's and the video decoder's alike, with the weights: both keep what they took.
        free, total = torch.cuda.mem_get_info()
        row["device_bytes"] = total - free
    if row["passed"]:
        calls = {"decode": finished(decode), "internalize": finished(internalize)}
        times = together(calls, "cpu", seconds, most=30)
        row |= {f"{name}_seconds": median for name, median in times.items()}
    return row


def _context(ids: Tensor, count: int) -> Tensor:
    """A prompt about some frames, for another number of them."""
    opening, instruction = ids[:INTRODUCTION_TOKENS], ids[-INSTRUCTION_TOKENS:]
    frames = ids[INTRODUCTION_TOKENS:-INSTRUCTION_TOKENS]
    return torch.cat([opening, frames[: len(frames) // PROMPT_FRAMES].repeat(count), instruction])
