"""lora_linear at the 500M shape on a CPU: the released op order against ours, in one run.

E examples of T tokens, float32, random data, adapters of rank 32 (16 generated, 16 of the bias).
``released`` repeats the adapters for every example and multiplies them with einsum. Both take
turns; ratios are printed and stored only where outputs and gradients agree. One thread: with as
many threads as cores, the short operations here wait for each other whenever anything else runs.

    python -m bench.cpu
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import released
from bench.environment import environment
from bench.records import RESULTS, write
from bench.timing import together
from csrc_triton import lora_linear

D_IN, D_OUT, RANK, SCALE = 2560, 960, 32, 128.0
# float32 sums over 2,560 terms in two orders; a structural difference is 0.2 or more.
ALLOWED_ERROR = 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 832, 4096], metavar="T")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8], metavar="N")
    parser.add_argument("--examples", type=int, default=8, metavar="E")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="spent on each measurement")
    parser.add_argument("--out", type=Path, default=RESULTS / "lora_linear_cpu.json")
    options = parser.parse_args()
    for adapters in options.adapters:
        if adapters < 1 or options.examples % adapters:
            parser.error(f"{options.examples} examples cannot share {adapters} adapters evenly")
    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    rows = []
    for tokens in options.tokens:
        for adapters in options.adapters:
            for row in compare(options.examples, tokens, adapters, options.seconds):
                rows.append(row)
                print(line(row), flush=True)
    record = {"benchmark": "lora_linear_cpu", **environment(), "threads": options.threads}
    record["load_average_before"] = load
    record |= {"shape": {"d_in": D_IN, "d_out": D_OUT, "rank": RANK}, "rows": rows}
    write(record, options.out)
    print(f"written to {options.out}")
    return 0 if all(row["correct"] for row in rows) else 1


def compare(examples: int, tokens: int, adapters: int, seconds: float) -> list[dict[str, Any]]:
    """Forward, and forward with backward, of both op orders."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, weight = rand(examples, tokens, D_IN), rand(D_OUT, D_IN) / D_IN**0.5
    a, b = rand(adapters, RANK, D_IN) / D_IN**0.5, rand(adapters, RANK, D_OUT) / SCALE
    grad = rand(examples, tokens, D_OUT)
    questions = torch.full((adapters,), examples // adapters)
    index = torch.arange(adapters).repeat_interleave(examples // adapters)
    variants = {
        "released": lambda: released.lora_linear(x, weight, a, b, questions, SCALE),
        "ours": lambda: lora_linear(x, weight, None, a, b, index, SCALE),
    }

    def trained(variant: str) -> list[Tensor]:
        out = variants[variant]()
        return [out.detach(), *torch.autograd.grad(out, (x, a, b), grad)]

    rows = []
    for direction in ("forward", "forward+backward"):
        training = direction != "forward"
        for factor in (x, a, b):
            factor.requires_grad_(training)
        theirs, ours = (trained(v) if training else [variants[v]()] for v in variants)
        error = max(
            ((o - t).norm() / t.norm()).item() for o, t in zip(ours, theirs, strict=True)
        )
        row: dict[str, Any] = {
            "direction": direction,
            "examples": examples,
            "tokens": tokens,
            "adapters": adapters,
            "relative_error": error,
            "correct": error <= ALLOWED_ERROR,
        }
        calls = {v: (lambda v=v: trained(v)) if training else variants[v] for v in variants}
        for variant, found in together(calls, "cpu", seconds).items():
            row[f"{variant}_seconds"] = found
        if row["correct"]:
            row["seconds_ratio"] = row["ours_seconds"] / row["released_seconds"]
        rows.append(row)
    return rows


def line(row: dict[str, Any]) -> str:
    text = (
        f"E = {row['examples']}  T = {row['tokens']:4d}  n = {row['adapters']}  "
        f"{row['direction']:16s}  released {row['released_seconds'] * 1e3:8.2f} ms  "
        f"ours {row['ours_seconds'] * 1e3:8.2f} ms  "
    )
    if not row["correct"]:
        return text + f"WRONG: relative error {row['relative_error']:.1e}, no ratio"
    return text + f"ratio {row['seconds_ratio']:.3f}  error {row['relative_error']:.1e}"


if __name__ == "__main__":
    raise SystemExit(main())
