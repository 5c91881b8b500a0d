"""Frames per second of each video decoder, and how far its frames are from PyAV's.

Twelve uniform frames of a short and of a long clip, then 1,024 consecutive ones, as
``v2l_fast.video`` reads them: from opening the file to uint8 frames on the device. The clips are
made here, a moving gradient with a bar, in VP9 for all decoders and in H.264 for those that decode
it. Decoders take turns in one process. One that is not installed, or does not decode a clip on this
device, is recorded with the reason.

With --training, CPU time of a training video instead: 12 frames of 25 s of 720p, from opening the
file to the views of the vision tower, of a file, of a span of a longer file, and of the small copy
of the span that ``v2l transcode`` writes. The released order decodes every frame up to the last
sampled one, as transformers' reader does, a seeking reader (as decord's) each sampled frame from
the keyframe before it; Pillow resizes for both. CPU time is that of all threads; on a busy
machine it grows by a fifth to a third, and the orders take turns.
"""

from __future__ import annotations

import bisect
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from bench.harness import RESULTS, argument_parser, environment, median_latency, write_record
from bench.models import CODECS, FPS, write_clip, write_pattern
from v2l_fast.data.manifest import Example, VideoExamples
from v2l_fast.data.readers import ClipReader
from v2l_fast.data.transcode import TranscodeSettings, write_copy
from v2l_fast.errors import VideoError
from v2l_fast.video import FrameSampling, Limits, decode, probe
from v2l_fast.video.preprocess import frame_views, resized_size
from v2l_fast.video.reader import Backend, load_spans

EXAMPLES = """
  python -m bench.runs.decode
  python -m bench.runs.decode --device cuda --height 1080
  python -m bench.runs.decode --training"""
BACKENDS: tuple[Backend, ...] = ("pyav", "torchcodec", "dali")
# Name, frames of the clip (None: --long), frames to read.
CASES = (("short, 12 uniform", 10 * FPS, 12), ("long, 12 uniform", None, 12))
CONSECUTIVE = 1024
OUT = RESULTS / "decode.json"
LIMITS = Limits(max_bytes=64 << 30)
# Of --training: seconds of the longer file, the span, height, bits/s, and the 500M recipe's sizes.
LONG_SECONDS, SPAN, HEIGHT, BIT_RATE = 60, (20.0, 45.0), 720, 2_000_000
SAMPLING, TILE = FrameSampling(12, 384), 512

Views = Callable[[VideoExamples], torch.Tensor]


def main() -> int:
    parser = argument_parser("bench.runs.decode", __doc__, EXAMPLES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--height", type=int, default=240, help="of the 16:9 clips; default: 240")
    parser.add_argument("--long", type=int, default=60 * FPS, metavar="N", help="frames")
    parser.add_argument("--rounds", type=int, default=3, help="timed reads; default: 3")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--training", action="store_true", help="measure training videos (decode_training.json)"
    )
    options = parser.parse_args()
    if options.training:
        out = options.out
        training(options.rounds, out.with_name("decode_training.json") if out == OUT else out)
        return 0
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


# --- training videos ------------------------------------------------------------------------------


def training(rounds: int, out: Path) -> None:
    """Measure and write the record of training videos."""
    torch.set_num_threads(1)
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        length = SPAN[1] - SPAN[0]
        file = write_pattern(folder / "file.mp4", length, HEIGHT, BIT_RATE)
        long = write_pattern(folder / "long.mp4", LONG_SECONDS, HEIGHT, BIT_RATE)
        span = _video(long, SPAN)
        start = time.process_time()
        copy = folder / "copy.mp4"
        write_copy(span, copy, TranscodeSettings(SAMPLING.longest_edge))
        copying = time.process_time() - start
        cases = {
            f"{HEIGHT}p, a file of {length:g} s": _video(file),
            f"{HEIGHT}p, a span of {length:g} s in {LONG_SECONDS} s": span,
            "a copy of the span (v2l transcode)": _video(copy),
        }
        orders: dict[str, Views] = {"ours": _ours, "all frames": _all_frames, "seek": _seek}
        calls = {
            (case, order): partial(views, video)
            for case, video in cases.items()
            for order, views in orders.items()
        }
        views = {key: call() for key, call in calls.items()}
        seconds = _cpu_seconds(calls, rounds)
        (clip,) = load_spans(copy, SAMPLING)
        resize = _cpu_seconds(
            {"": lambda: frame_views(clip.frames, SAMPLING.longest_edge, TILE)}, rounds
        )[""]
        rows = []
        for case, video in cases.items():
            ours, reference = views[case, "ours"], views[case, "ours"]
            if video.path == str(copy):
                reference = views[list(cases)[1], "ours"]
            rows.append(
                {
                    "case": case,
                    "bytes": os.path.getsize(video.path),
                    "pixel_error": (ours.float() - reference.float()).abs().mean().item(),
                    "orders": {
                        order: {
                            "cpu_seconds": seconds[case, order],
                            "videos_per_second_and_core": 1 / seconds[case, order],
                            "equal_to_ours": torch.equal(views[case, order], ours),
                        }
                        for order in orders
                    },
                }
            )
            for order in orders:
                print(f"{case:40s} {order:12s} {seconds[case, order] * 1e3:9.1f} ms", flush=True)
        load.append(os.getloadavg()[0])
        record = {
            "benchmark": "decode_training", **environment(), "threads": 1, "load": load,
            "frames": SAMPLING.max_frames, "tile": TILE, "bit_rate": BIT_RATE,
            "copying_cpu_seconds": copying, "resize_cpu_seconds": resize, "rows": rows,
        }  # fmt: skip
    write_record(record, out)


def _video(path: Path, span: tuple[float, float] | None = None) -> VideoExamples:
    metadata = {} if span is None else {"span": list(span)}
    example = Example("clip", path.name, str(path), "caption", "", "", metadata=metadata)
    return VideoExamples(str(path), span, (example,))


def _cpu_seconds(calls: Mapping[Any, Callable[[], object]], rounds: int) -> dict[Any, float]:
    """Median CPU time of each call, all threads together; the calls take turns."""
    times: dict[Any, list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            start = time.process_time()
            call()
            times[key].append(time.process_time() - start)
    return {key: statistics.median(taken) for key, taken in times.items()}


def _ours(video: VideoExamples) -> torch.Tensor:
    return ClipReader(SAMPLING).views(video, 1, TILE)[0].visual


def _sampled(stream: av.VideoStream, span: tuple[float, float] | None) -> list[int]:
    rate = float(stream.average_rate or 0)
    first, stop = (0, stream.frames) if span is None else (round(t * rate) for t in span)
    return (first + SAMPLING.indices(stop - first, rate, (stop - first) / rate)).tolist()


def _all_frames(video: VideoExamples) -> torch.Tensor:
    """Decode every frame up to the last sampled one, as the released order does."""
    with av.open(video.path) as container:
        stream = container.streams.video[0]
        indices = _sampled(stream, video.span)
        images = []
        for index, frame in enumerate(container.decode(stream)):
            if index in indices:
                images.append(frame.to_ndarray(format="rgb24"))
            if index == indices[-1]:
                break
    return _pillow_views(images)


def _seek(video: VideoExamples) -> torch.Tensor:
    """Decode each sampled frame from the keyframe before it, or on from the last sampled one."""
    with av.open(video.path) as container:
        stream = container.streams.video[0]
        with av.open(video.path) as table:
            packets = [p for p in table.demux(video=0) if p.pts is not None]
        times = sorted(p.pts for p in packets if p.pts is not None)
        keys = sorted(p.pts for p in packets if p.is_keyframe and p.pts is not None)
        frames, images, position = container.decode(stream), [], -1
        for index in _sampled(stream, video.span):
            key = keys[bisect.bisect_right(keys, times[index]) - 1]
            if position < key:
                container.seek(key, stream=stream)
                frames = container.decode(stream)
            for frame in frames:
                position = frame.pts or 0
                if position == times[index]:
                    images.append(frame.to_ndarray(format="rgb24"))
                    break
    return _pillow_views(images)


def _pillow_views(images: Sequence[np.ndarray]) -> torch.Tensor:
    """Views of RGB frames as transformers 4.51.3 makes them, where one view holds a frame."""
    from PIL import Image

    height, width = resized_size(*images[0].shape[:2], SAMPLING.longest_edge)
    views = []
    for image in images:
        small = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
        views.append(np.asarray(small.resize((TILE, TILE), Image.Resampling.LANCZOS)))
    return torch.from_numpy(np.stack(views)).movedim(-1, 1)


if __name__ == "__main__":
    sys.exit(main())
