"""A video becomes an adapter: from its file and stage by stage, at a released shape.

Random weights. ``--source file`` decodes H.264 files of 12 and 1,024 frames, resizes, encodes, and
runs decoder and hypernetwork layer by layer, as the server does; it checks that every frame is read
and the adapter is finite, and records the GPU memory in use. ``--source frames`` starts from 12
frames in memory and measures the stages under each backend, after a comparison of the adapter with
the released op order's.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import released
from bench.harness import (
    RESULTS,
    argument_parser,
    backend,
    environment,
    error_limit,
    json_number,
    median_latency,
    relative_error,
    write_record,
)
from bench.models import (
    FPS,
    FRAMES,
    INSTRUCTION_TOKENS,
    INTRODUCTION_TOKENS,
    SHAPES,
    RandomPair,
    Shape,
    write_clip,
)
from bench.runs.answer import judge
from v2l_fast.hypernet.adapter import AdapterBatch
from v2l_fast.video import Clip, Limits, fallbacks, load_video
from v2l_fast.video.reader import resolve_backend

EXAMPLES = """
  python -m bench.runs.internalize --shape 500M --device cuda
  python -m bench.runs.internalize --shape tiny --source frames"""
FILE_FRAMES = (12, 1024)
HEIGHT = 720
LIMITS = Limits(max_bytes=64 << 30)


def main() -> int:
    parser = argument_parser("bench.runs.internalize", __doc__, EXAMPLES)
    parser.add_argument("--shape", choices=("500M", "2.2B", "tiny"), required=True)
    parser.add_argument("--source", choices=("file", "frames"), default="file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each time; default: 3")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="default: in bench/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape, device, seconds = SHAPES[options.shape], options.device, options.seconds
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    kind = "serve_video" if options.source == "file" else "internalize"
    name = f"{kind}_{shape.name}_{device}"
    record = {"benchmark": name, **environment(device), "threads": options.threads}
    record["shape"] = shape.name
    if options.source == "file":
        record |= from_files(shape, device, dtype, seconds, compile=device == "cuda")
    else:
        record |= from_frames(shape, device, dtype, seconds)
    print(json.dumps(record, indent=2))
    record["targets"] = judge(record)
    write_record(record, options.out or RESULTS / f"{name}.json")
    return 0 if record["passed"] else 1


# --- from files -----------------------------------------------------------------------------------


@torch.inference_mode()
def from_files(
    shape: Shape, device: str, dtype: torch.dtype, seconds: float, compile: bool
) -> dict[str, Any]:
    """A row for each number of frames; ``seconds`` to spend on each time."""
    fallbacks.clear()
    pair = RandomPair(shape, device, dtype)
    if compile:
        pair.compile()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count in FILE_FRAMES:
            length = max(count, 10 * FPS)
            path = write_clip(Path(folder) / f"{count}.mp4", "h264", length, HEIGHT)
            rows.append(_row(pair, path, count, seconds))
    return {
        "longest_edge": shape.longest_edge, "height": HEIGHT,
        "decoder": resolve_backend("auto", device),
        "decoder_fallbacks": fallbacks.reasons(), "rows": rows,
        "passed": all(row["passed"] for row in rows),
    }  # fmt: skip


def _row(pair: RandomPair, path: Path, count: int, seconds: float) -> dict[str, Any]:
    ids, device = _resized_prompt(pair.context, count), pair.device

    def decode() -> Clip:
        options = {"limits": LIMITS, "longest_edge": pair.edge, "device": device}
        return load_video(path, count, exact_frames=True, **options)

    def internalize() -> AdapterBatch:
        return pair.adapters(pair.encode(decode().frames), ids)

    frames = len(decode().frames)
    if device == "cuda":
        torch.cuda.empty_cache()
    adapters = internalize()
    factors = [factor for side in (adapters.A, adapters.B) for factor in side.values()]
    finite = all(bool(factor.isfinite().all()) for factor in factors)
    passed = frames == count and finite
    row = {"frames": frames, "context_tokens": len(ids), "passed": passed}
    if device == "cuda":
        # Weights, and what PyTorch and the video decoder have reserved.
        free, total = torch.cuda.mem_get_info()
        row["device_bytes"] = total - free
    if passed:
        calls = {"decode": decode, "internalize": internalize}
        times = median_latency(calls, device, seconds)
        row |= {f"{name}_seconds": median for name, median in times.items()}
    return row


def _resized_prompt(ids: Tensor, count: int) -> Tensor:
    """The prompt about ``FRAMES`` frames, changed to ``count`` frames."""
    start, end = ids[:INTRODUCTION_TOKENS], ids[-INSTRUCTION_TOKENS:]
    frames = ids[INTRODUCTION_TOKENS:-INSTRUCTION_TOKENS]
    return torch.cat([start, frames[: len(frames) // FRAMES].repeat(count), end])


# --- from frames ----------------------------------------------------------------------------------


@torch.inference_mode()
def from_frames(shape: Shape, device: str, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """Median seconds of each stage, for the released op order, plain torch and, on a GPU, ours."""
    pair = RandomPair(shape, device, dtype)

    def internalize(name: str) -> tuple[Tensor, Tensor]:
        with backend(name):
            batch = pair.adapters(pair.encode())
        return batch.A["down_proj"], batch.B["down_proj"]

    def released_order() -> tuple[Tensor, Tensor]:
        """The features of all layers first, then the released op order."""
        hidden = torch.stack(list(pair.layer_inputs(pair.encode())), 1)
        a, b = released.hypernetwork(pair.network, hidden)
        return a["down_proj"], b["down_proj"]

    names = ("reference", "triton") if device == "cuda" else ("reference",)
    expected = released_order()
    error = max(
        relative_error(ours, theirs)
        for name in names
        for ours, theirs in zip(internalize(name), expected, strict=True)
    )
    # Twelve layers deep, and the released order itself rounds in each of them.
    allowed = 8 * error_limit(dtype)
    record: dict[str, Any] = {
        "shape": shape.name, "frames": FRAMES, "context_tokens": len(pair.context),
        "error": json_number(error), "limit": allowed, "passed": error <= allowed,
    }  # fmt: skip
    if not record["passed"]:
        return {**record, "reason": "the adapter differs from the released op order's"}
    whole = median_latency({"internalize": released_order}, device, seconds, most=10)
    record["variants"] = {"released": whole}
    features = pair.encode()
    for name in names:
        calls = {
            "vision": pair.encode,
            "decoder and hypernetwork": lambda: pair.adapters(features),
            "internalize": lambda: pair.adapters(pair.encode()),
        }
        with backend(name):
            record["variants"][name] = median_latency(calls, device, seconds, most=10)
    return record


if __name__ == "__main__":
    raise SystemExit(main())
