"""Frames per second of each video decoder, and how far its frames are from PyAV's.

Twelve uniform frames of a short and of a long clip, then 1,024 consecutive ones, as
``v2l_fast.video`` reads them: from opening the file to uint8 frames on the device. The clips are
made here, a moving gradient with a bar, in VP9 for all decoders and in H.264 for those that decode
it. Decoders take turns in one process. One that is not installed, or does not decode a clip on this
device, is recorded with the reason.
"""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness import RESULTS, argument_parser, environment, median_latency, write_record
from bench.models import CODECS, FPS, write_clip
from v2l_fast.errors import VideoError
from v2l_fast.video import Limits, decode, probe
from v2l_fast.video.reader import Backend

EXAMPLES = """
  python -m bench.runs.decode
  python -m bench.runs.decode --device cuda --height 1080"""
BACKENDS: tuple[Backend, ...] = ("pyav", "torchcodec", "dali")
# Name, frames of the clip (None: --long), frames to read.
CASES = (("short, 12 uniform", 10 * FPS, 12), ("long, 12 uniform", None, 12))
CONSECUTIVE = 1024
LIMITS = Limits(max_bytes=64 << 30)


def main() -> int:
    parser = argument_parser("bench.runs.decode", __doc__, EXAMPLES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--height", type=int, default=240, help="of the 16:9 clips; default: 240")
    parser.add_argument("--long", type=int, default=60 * FPS, metavar="N", help="frames")
    parser.add_argument("--rounds", type=int, default=3, help="timed reads; default: 3")
    parser.add_argument("--out", type=Path, default=RESULTS / "decode.json")
    options = parser.parse_args()
    how = options.device, options.rounds
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for codec in CODECS:
            long = max(options.long, CONSECUTIVE)
            clips = {
                count: write_clip(Path(folder) / f"{count}.mp4", codec, count, options.height)
                for count in (CASES[0][1], long)
            }
            for name, count, frames in CASES:
                count = count or long
                indices = np.linspace(0, count - 1, frames).astype(np.int64)
                rows.append(measure(clips[count], name, codec, indices, *how))
            indices = np.arange(CONSECUTIVE, dtype=np.int64)
            rows.append(measure(clips[long], "1,024 consecutive", codec, indices, *how))
    record = {
        "benchmark": "decode", **environment(options.device), "decode_device": options.device,
        "threads": torch.get_num_threads(), "rows": rows,
    }  # fmt: skip
    write_record(record, options.out)
    return 0


def measure(
    path: Path, name: str, codec: str, indices: np.ndarray, device: str, rounds: int
) -> dict[str, Any]:
    """Median seconds, frames per second and error of each backend."""
    info = probe(path)
    row: dict[str, Any] = {
        "case": name, "codec": codec, "frames": len(indices), "clip_frames": info.num_frames,
        "size": [info.width, info.height], "backends": {},
    }  # fmt: skip
    reference = decode(path, indices, "pyav", LIMITS)
    usable = []
    for backend in BACKENDS:
        try:
            # Also warms up: the first call starts pipelines and contexts.
            frames = decode(path, indices, backend, LIMITS, device).cpu()
        except VideoError as error:
            row["backends"][backend] = {"refused": str(error).removeprefix(f"{path}: ")}
            continue
        usable.append(backend)
        row["backends"][backend] = {"error": difference(frames, reference)}
    calls = {b: lambda b=b: decode(path, indices, b, LIMITS, device) for b in usable}
    times = median_latency(calls, device, math.inf, most=rounds)
    for backend, median in times.items():
        result = row["backends"][backend]
        result |= {"seconds": median, "frames_per_second": len(indices) / median}
        print(
            f"{codec:5s} {name:18s} {backend:10s} {median * 1e3:9.1f} ms "
            f"{len(indices) / median:9.1f} frames/s   error mean {result['error']['mean']:.2f}, "
            f"worst block {result['error']['worst_block']:.1f}, max {result['error']['max']}",
            flush=True,
        )
    return row


def difference(frames: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Errors in levels of 255, of pixels and of the means of 8 x 8 blocks, free of chroma edges."""
    worst, total, block = 0, 0.0, 0.0
    for one, other in zip(frames, reference, strict=True):
        gap = one.float() - other.float()
        worst = max(worst, int(gap.abs().max()))
        total += gap.abs().mean().item()
        means = torch.nn.functional.avg_pool2d(gap.movedim(-1, 0), 8)
        block = max(block, means.abs().max().item())
    return {"mean": total / len(frames), "max": worst, "worst_block": block}


if __name__ == "__main__":
    sys.exit(main())
