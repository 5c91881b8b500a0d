"""Internalizing at the 500M shape: the released op order in one batch against layers streamed.

The hypernetwork alone, random weights, float32, one video. ``released`` has the features of all
layers at once and runs ``bench/released.py``; ``streamed`` gets one layer's features at a time, as
the decoder produces them, and keeps nothing else. Each runs in a process of its own, whose peak
resident memory is that of the whole process, weights included. Ratios are printed and stored only
if both gave the same adapter.

    python -m bench.hypernet_streaming --threads 2
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bench import records, released
from bench.environment import environment
from v2l_fast.hypernet.config import HypernetConfig
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.tensor_files import save_tensors

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = ("released", "streamed")
HIDDEN, LAYERS, INTERMEDIATE = 960, 32, 2560
# float32 against float32 over nine blocks; a structural difference is 0.2 or more.
ALLOWED_ERROR = 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 832, 4096], metavar="S")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench" / "results" / "hypernet_streaming.json"
    )
    parser.add_argument("--run", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--factors", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        record = measure(options.run, options.tokens[0], options.threads, options.factors)
        print(json.dumps(record))
        return 0
    rows = [compare(tokens, options.threads) for tokens in options.tokens]
    record = {"benchmark": "hypernet_streaming", **environment(), "threads": options.threads}
    record["rows"] = rows
    records.write(record, options.out)
    print(f"written to {options.out}")
    return 0 if all(row["correct"] for row in rows) else 1


def compare(tokens: int, threads: int) -> dict[str, Any]:
    """Both variants at S tokens, and their ratios when they agree."""
    row: dict[str, Any] = {"tokens": tokens}
    with tempfile.TemporaryDirectory() as folder:
        for variant in VARIANTS:
            factors = Path(folder) / f"{variant}.safetensors"
            command = [sys.executable, "-m", "bench.hypernet_streaming", "--run", variant]
            command += ["--tokens", str(tokens)]
            command += ["--threads", str(threads), "--factors", str(factors)]
            threaded = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=threaded, cwd=ROOT
            )
            row[variant] = json.loads(done.stdout.splitlines()[-1])
            found = row[variant]
            print(
                f"S = {tokens:5d}  {variant:9s} {found['seconds']:8.2f} s   "
                f"peak {found['peak_bytes'] / 2**30:6.2f} GiB "
                f"({found['added_bytes'] / 2**30:.2f} GiB above weights)",
                flush=True,
            )
        row["relative_error"] = difference(*(Path(folder) / f"{v}.safetensors" for v in VARIANTS))
    row["correct"] = row["relative_error"] <= ALLOWED_ERROR
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
    """Largest relative Frobenius difference of a factor."""
    one, other = load_file(first), load_file(second)
    return max(((other[k] - one[k]).norm() / one[k].norm()).item() for k in one)


def measure(variant: str, tokens: int, threads: int, factors: Path) -> dict[str, Any]:
    """Seconds and bytes of one variant in this process; its adapter is written to ``factors``."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network = HyperNetwork(HypernetConfig(HIDDEN, LAYERS, {"down_proj": (INTERMEDIATE, HIDDEN)}))
    with torch.no_grad():
        # Fresh scalers of B are 0; these make both factors part of the check.
        network.scaler_B["down_proj"].normal_()

    def layer_input(index: int, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(1, length, HIDDEN, generator=generator)

    @torch.inference_mode()
    def run(length: int) -> tuple[dict, dict, float]:
        if variant == "released":
            features = torch.stack([layer_input(i, length) for i in range(LAYERS)], 1)
            start = time.perf_counter()
            a, b = released.hypernetwork(network, features)
            return a, b, time.perf_counter() - start
        per_layer, seconds = [], 0.0
        for index in range(LAYERS):
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


def peak_bytes() -> int:
    """Peak resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    sys.exit(main())
