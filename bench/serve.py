"""Serving: one question in every way there is, a video internalized, and the engine under load.

python -m bench.serve                                  # shipped model on the CPU
python -m bench.serve --shape 500M --device cuda       # released shapes, random weights
python -m bench.serve --video --shape 500M --device cuda      # from H.264 files to adapters
python -m bench.serve --load --minutes 10              # 64 clients over HTTP, odd ones beside
python -m bench.serve --engine-load --minutes 10       # the engine alone, every answer checked
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bench.environment import environment
from bench.records import RESULTS, write

if TYPE_CHECKING:
    from bench.end_to_end import Shape


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--load", action="store_true", help="the server under load, over HTTP")
    part.add_argument("--engine-load", action="store_true", help="the engine under load")
    part.add_argument("--video", action="store_true", help="internalizing 12 and 1,024 frames")
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
    if options.video and options.shape == "shapes":
        parser.error("--video has random weights: give one of the other shapes")
    torch.set_num_threads(options.threads)
    record = {**environment(options.device), "threads": options.threads}
    record["load_average_before"] = os.getloadavg()[0]
    name = f"serve_{options.shape}_{options.device}"
    measure = _ways
    if options.video:
        name, measure = f"serve_video_{options.shape}_{options.device}", _video
    elif options.load:
        name, measure = "serve_http", _load
    elif options.engine_load:
        name, measure = "serve_load", _engine_load
    passed = measure(options, record)
    out = options.out or RESULTS / f"{name}.json"
    write({"benchmark": name, **record}, out)
    print(f"written to {out}")
    return 0 if passed else 1


def _load(options: argparse.Namespace, record: dict) -> bool:
    from bench.serve_http import run

    seed, threads = options.seed, options.threads
    record |= run(options.minutes, options.clients, options.videos, seed, threads, print)
    for problem in record["problems"][:5] + record["load"]["errors"][:5]:
        print(f"PROBLEM {problem}")
    print(
        f"first token p95 {record['first_token_ratio']:.2f} times the quiet run's; "
        f"memory {record['resident_bytes']['growth']:+.1%}; odd: {record['odd']}, "
        f"8K clip: {record['clip_8k']}"
    )
    print("  ".join(f"{name}: {'yes' if ok else 'NO'}" for name, ok in record["passed"].items()))
    return all(record["passed"].values())


def _engine_load(options: argparse.Namespace, record: dict) -> bool:
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


def _random(options: argparse.Namespace) -> tuple[Shape, str, torch.dtype]:
    """Shape, device and dtype of random weights."""
    from bench.end_to_end import SHAPES, TINY

    shapes = {shape.name: shape for shape in (*SHAPES, TINY)}
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    return shapes[options.shape], options.device, dtype


def _video(options: argparse.Namespace, record: dict) -> bool:
    from bench import serve_video

    gpu = options.device == "cuda"
    found = serve_video.measure(*_random(options), options.seconds, compile=gpu)
    record |= {"shape": options.shape, **found}
    for row in found["rows"]:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    _judge(record)
    return found["passed"]


def _judge(record: dict) -> None:
    """Targets are told and kept; missing one is a figure, not a failure."""
    from bench.serve_targets import judged

    record["targets"] = judged(record)
    for name, target in record["targets"].items():
        verdict = "met" if target["met"] else "MISSED"
        print(f"target {name}: {target['reached']:.4g}, set out for {target['limit']:g}: {verdict}")


def _ways(options: argparse.Namespace, record: dict) -> bool:
    from bench import serve_ways

    checked = False
    if options.shape == "shapes":
        asked = serve_ways.shipped(options.seed)
    else:
        shape, device, dtype = _random(options)
        if dtype != torch.float32:
            exact = serve_ways.random_weights(shape, device, torch.float32, compile=False)
            checked = not serve_ways.disagreeing(exact, options.new_tokens)
            del exact
        asked = serve_ways.random_weights(shape, device, dtype, compile=device == "cuda")
    found = serve_ways.compare(asked, options.new_tokens, options.seconds, checked)
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
    _judge(record)
    return found["passed"]


if __name__ == "__main__":
    raise SystemExit(main())
