"""Serving: one question in every way there is, and the engine under load.

    python -m bench.serve                                  # shipped model on the CPU
    python -m bench.serve --shape 500M --device cuda       # released shapes, random weights
    python -m bench.serve --load --minutes 10              # 64 clients, every answer checked
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from bench.environment import environment
from bench.records import RESULTS, write


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load", action="store_true", help="the engine under load")
    parser.add_argument("--minutes", type=float, default=10.0, help="of load")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--videos", type=int, default=8, help="adapters in use")
    parser.add_argument("--shape", choices=("shapes", "500M", "2.2B", "tiny"), default="shapes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=3.0, help="spent on each measurement")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    record = {**environment(options.device), "threads": options.threads}
    record["load_average_before"] = os.getloadavg()[0]
    passed = _load(options, record) if options.load else _ways(options, record)
    name = "serve_load" if options.load else f"serve_{options.shape}_{options.device}"
    out = options.out or RESULTS / f"{name}.json"
    write({"benchmark": name, **record}, out)
    print(f"written to {out}")
    return 0 if passed else 1


def _load(options: argparse.Namespace, record: dict) -> bool:
    from bench.serve_load import run

    found = run(options.minutes, options.clients, options.videos, options.seed, print)
    record |= found
    load = found["load"]
    for name, what in (("time_to_first_token", "first token"), ("between_pieces", "next piece")):
        times = load[name]
        print(f"{what:12s} p50 {times['p50'] * 1e3:7.1f} ms  p95 {times['p95'] * 1e3:7.1f} ms")
    print(
        f"{load['requests']} answers, {load['wrong_answers']} wrong, {load['error_count']} errors; "
        f"{found['speedup']:.2f} times one at a time; "
        f"memory {found['resident_bytes']['growth']:+.1%}"
    )
    print("  ".join(f"{name}: {'yes' if ok else 'NO'}" for name, ok in found["passed"].items()))
    return all(found["passed"].values())


def _ways(options: argparse.Namespace, record: dict) -> bool:
    from bench import end_to_end, serve_ways

    if options.shape == "shapes":
        asked = serve_ways.shipped(options.seed)
    else:
        shapes = {shape.name: shape for shape in (*end_to_end.SHAPES, end_to_end.TINY)}
        gpu = options.device == "cuda"
        dtype = torch.bfloat16 if gpu else torch.float32
        asked = serve_ways.random_weights(shapes[options.shape], options.device, dtype, gpu)
    found = serve_ways.compare(asked, options.new_tokens, options.seconds)
    record |= {"shape": options.shape, **found}
    if not found["passed"]:
        print(f"WRONG: {', '.join(found['disagree'])} answer differently; no times")
    for name, times in found["ways"].items():
        share = times.get("weight_floor_share")
        print(
            f"{name:32s} first token {times['time_to_first_token'] * 1e3:8.2f} ms  "
            f"then {times['tokens_per_second']:8.1f} tokens/s"
            + ("" if share is None else f"  {share:.0%} of what reading the weights allows")
        )
    return found["passed"]


if __name__ == "__main__":
    raise SystemExit(main())
