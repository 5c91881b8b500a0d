"""Frames per second of each decoder, and how far its frames are from PyAV's.

Twelve uniform frames of a short and a long clip, then 1,024 consecutive ones, as `v2l_fast.video`
reads them: from opening the file to uint8 frames on the device. Clips are made on the fly: a moving
gradient with a bar, VP9 for all backends, H.264 too for those that decode it. Backends take turns
in one process; a decoder that is not installed, or does not decode the clip on this device, is
listed with the reason instead of a figure.

    python -m bench.decode
    python -m bench.decode --device cuda --height 1080
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from bench.environment import environment
from bench.records import RESULTS, write
from v2l_fast.errors import VideoError
from v2l_fast.video import Limits, decode, probe
from v2l_fast.video.reading import Backend

BACKENDS: tuple[Backend, ...] = ("pyav", "torchcodec", "dali")
CODECS = {"vp9": "libvpx-vp9", "h264": "libx264"}
OPTIONS = {
    "vp9": {"cpu-used": "8", "deadline": "realtime", "g": "48"},
    "h264": {"preset": "ultrafast", "g": "48"},
}
FPS = 24
# Name, frames of the clip (None: --long), frames asked for.
CASES = (("short, 12 uniform", 10 * FPS, 12), ("long, 12 uniform", None, 12))
CONSECUTIVE = 1024
LIMITS = Limits(max_bytes=64 << 30)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--height", type=int, default=240, help="of the clips; 16:9")
    parser.add_argument("--long", type=int, default=60 * FPS, metavar="F", help="frames")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "decode.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for codec in CODECS:
            long = max(options.long, CONSECUTIVE)
            clips = {
                count: make(Path(folder) / f"{codec}-{count}.mp4", codec, count, options.height)
                for count in (CASES[0][1], long)
            }
            for name, count, asked in CASES:
                count = count or long
                indices = np.linspace(0, count - 1, asked).astype(np.int64)
                rows.append(measure(clips[count], name, codec, indices, options))
            run = np.arange(CONSECUTIVE, dtype=np.int64)
            rows.append(measure(clips[long], "1,024 consecutive", codec, run, options))
    record = {
        "benchmark": "decode", **environment(options.device), "decode_device": options.device,
        "threads": torch.get_num_threads(), "rows": rows,
    }  # fmt: skip
    write(record, options.out)
    print(f"written to {options.out}")
    return 0


def make(path: Path, codec: str, count: int, height: int) -> Path:
    """A clip of `count` frames whose gradient drifts and whose bar moves."""
    width = height * 16 // 9 // 2 * 2
    across = np.linspace(0, 2 * np.pi, width)
    image = np.empty((height, width, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[codec], rate=FPS, options=OPTIONS[codec])
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(count):
            image[..., 0], image[..., 1] = 128 + 90 * np.sin(across + i / 40), 100
            image[..., 2] = 128 + 90 * np.cos(across)
            left = i * 3 % (width - 16)
            image[:, left : left + 16] = 230
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def measure(
    path: Path, name: str, codec: str, indices: np.ndarray, options: argparse.Namespace
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
            # Also the warm-up: pipelines and contexts start with the first call.
            frames = decode(path, indices, backend, LIMITS, options.device).cpu()
        except VideoError as error:
            row["backends"][backend] = {"refused": str(error).removeprefix(f"{path}: ")}
            continue
        usable.append(backend)
        row["backends"][backend] = {"error": difference(frames, reference)}
    seconds: dict[str, list[float]] = {backend: [] for backend in usable}
    for _ in range(options.rounds):
        for backend in usable:
            seconds[backend].append(timed(path, indices, backend, options.device))
    for backend in usable:
        median = statistics.median(seconds[backend])
        found = row["backends"][backend]
        found |= {"seconds": median, "frames_per_second": len(indices) / median}
        print(
            f"{codec:5s} {name:18s} {backend:10s} {median * 1e3:9.1f} ms "
            f"{len(indices) / median:9.1f} frames/s   error mean {found['error']['mean']:.2f}, "
            f"worst block {found['error']['worst_block']:.1f}, max {found['error']['max']}",
            flush=True,
        )
    return row


def timed(path: Path, indices: np.ndarray, backend: Backend, device: str) -> float:
    """Seconds until the frames are there."""
    start = time.perf_counter()
    frames = decode(path, indices, backend, LIMITS, device)
    if frames.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def difference(frames: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Levels of 255: of single pixels, and of means over 8 x 8 blocks, free of chroma edges."""
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
