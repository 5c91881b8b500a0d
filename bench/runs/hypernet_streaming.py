"""The hypernetwork at the 500M shape: the released op order in one batch, or layers streamed.

The hypernetwork alone, random weights, float32, one video. ``released`` has the features of all
layers at once and runs ``bench/released.py``. ``streamed`` gets the features of one layer at a
time, as the decoder produces them, and keeps nothing else. Each runs in a process of its own; its
peak resident memory includes the weights. Ratios are printed and stored only if both give the same
adapter.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bench import released
from bench.harness import (
    RESULTS,
    argument_parser,
    environment,
    peak_bytes,
    run_module,
    write_record,
)
from bench.models import SHAPES, random_hypernet
from v2l_fast.tensor_files import save_tensors

EXAMPLES = """
  python -m bench.runs.hypernet_streaming
  python -m bench.runs.hypernet_streaming --tokens 64 256 --threads 1"""
VARIANTS = ("released", "streamed")
# float32 against float32 over nine blocks; a structural difference is 0.2 or more.
ERROR_LIMIT = 1e-5


def main() -> int:
    parser = argument_parser("bench.runs.hypernet_streaming", __doc__, EXAMPLES)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[64, 832, 4096], metavar="S",
        help="context tokens; default: 64 832 4096",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--out", type=Path, default=RESULTS / "hypernet_streaming.json")
    parser.add_argument("--run", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--factors", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        row = measure(options.run, options.tokens[0], options.threads, options.factors)
        print(json.dumps(row))
        return 0
    rows = [compare(tokens, options.threads) for tokens in options.tokens]
    record = {"benchmark": "hypernet_streaming", **environment(), "threads": options.threads}
    write_record({**record, "rows": rows}, options.out)
    return 0 if all(row["correct"] for row in rows) else 1


def compare(tokens: int, threads: int) -> dict[str, Any]:
    """Both variants at S tokens, and their ratios if they agree."""
    row: dict[str, Any] = {"tokens": tokens}
    with tempfile.TemporaryDirectory() as folder:
        files = {variant: Path(folder) / f"{variant}.safetensors" for variant in VARIANTS}
        for variant, factors in files.items():
            arguments = ["--run", variant, "--tokens", str(tokens), "--factors", str(factors)]
            figures = run_module("bench.runs.hypernet_streaming", arguments, threads)
            row[variant] = figures
            print(
                f"S = {tokens:5d}  {variant:9s} {figures['seconds']:8.2f} s   "
                f"peak {figures['peak_bytes'] / 2**30:6.2f} GiB "
                f"({figures['added_bytes'] / 2**30:.2f} GiB above weights)",
                flush=True,
            )
        row["relative_error"] = difference(*files.values())
    row["correct"] = row["relative_error"] <= ERROR_LIMIT
    if row["correct"]:
        for name in ("seconds", "peak_bytes", "added_bytes"):
            row[f"{name}_ratio"] = row["streamed"][name] / row["released"][name]
        print(
            f"S = {tokens:5d}  streamed / released: time {row['seconds_ratio']:.3f}, "
            f"peak memory {row['peak_bytes_ratio']:.3f} "
            f"(above weights {row['added_bytes_ratio']:.3f}), "
            f"relative error {row['relative_error']:.1e}"
        )
    else:
        print(f"S = {tokens:5d}  WRONG: relative error {row['relative_error']:.1e}, no ratios")
    return row


def difference(first: Path, second: Path) -> float:
    """Largest relative difference of a factor in the Frobenius norm."""
    one, other = load_file(first), load_file(second)
    return max(((other[k] - one[k]).norm() / one[k].norm()).item() for k in one)


def measure(variant: str, tokens: int, threads: int, factors: Path) -> dict[str, Any]:
    """Seconds and bytes of one variant in this process; writes its adapter to ``factors``."""
    torch.set_num_threads(threads)
    network = random_hypernet(SHAPES["500M"])
    config = network.config

    def layer_input(index: int, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(1, length, config.hidden_size, generator=generator)

    @torch.inference_mode()
    def run(length: int) -> tuple[dict, dict, float]:
        if variant == "released":
            features = torch.stack([layer_input(i, length) for i in range(config.num_layers)], 1)
            start = time.perf_counter()
            a, b = released.hypernetwork(network, features)
            return a, b, time.perf_counter() - start
        per_layer, seconds = [], 0.0
        for index in range(config.num_layers):
            hidden = layer_input(index, length)
            start = time.perf_counter()
            per_layer.append(network.layer(index, hidden))
            seconds += time.perf_counter() - start
        batch = network.assemble(per_layer)
        return dict(batch.A), dict(batch.B), seconds

    run(8)
    before = peak_bytes()
    a, b, seconds = run(tokens)
    peak = peak_bytes()
    save_tensors({"A": a["down_proj"], "B": b["down_proj"]}, factors)
    return {"seconds": seconds, "peak_bytes": peak, "added_bytes": peak - before}


if __name__ == "__main__":
    sys.exit(main())
