"""Correctness of the ops on a GPU, then the hypernetwork against the released op order.

Prints one JSON object and a table. A speed-up is reported only when the result it belongs to is
right. ``--device cpu --layers 2`` tries the script without a GPU.

    python -m bench.gpu --out bench/results/gpu.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench import released
from bench.environment import environment
from csrc_triton import gated_projection, lora_linear, perceiver_attention, rank_projection
from v2l_fast.config import HypernetConfig
from v2l_fast.hypernet import HyperNetwork

# A bfloat16 result may be this far from float64, as a relative norm: 8 bits of mantissa in every
# operand of two chained products. Structural errors are above 0.2.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


def op_cases(generator: torch.Generator) -> dict[str, tuple[Callable, list[Tensor], set[int]]]:
    """Op name -> (call, float64 inputs on the CPU, indices kept in float32): odd, ragged sizes."""

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inv_rms = rand(3, 83).abs() + 0.5
    inv_rms[0, 40:] = 0
    inv_rms[1] = 0
    index = torch.tensor([1, -1, 0, 1])
    seen = torch.rand(2, 129, generator=generator) > 0.2
    return {
        "perceiver_attention": (
            lambda q, c, r: perceiver_attention(q * 0.1, c, r)[0],
            [rand(3, 40, 64), rand(3, 83, 64), inv_rms],
            {2},
        ),
        "rank_projection": (
            lambda x, w, a, b: torch.cat(rank_projection(x, w, a, b, d_in=70, d_out=33), -1),
            [rand(2, 1, 3, 5, 48), rand(3, 48, 103), rand(3, 5), rand(3, 5)],
            set(),
        ),
        "lora_linear": (
            lambda x, w, a, b: lora_linear(x, w, None, a, b, index.to(x.device), 0.5),
            [rand(4, 17, 65), rand(33, 65), rand(2, 8, 65), rand(2, 8, 33)],
            set(),
        ),
        "gated_projection": (
            lambda x, g, u, d: gated_projection(x, seen.to(x.device), g, u, d),
            [rand(2, 129, 40), rand(96, 40), rand(96, 40), rand(24, 96)],
            set(),
        ),
    }


def run_op(
    call: Callable, inputs: list[Tensor], exact: set[int], device: str, dtype: torch.dtype
) -> list[Tensor]:
    """Output and input gradients in float64 on the CPU."""
    wide = torch.promote_types(dtype, torch.float32)
    placed = [
        x.to(device, wide if i in exact else dtype).requires_grad_() for i, x in enumerate(inputs)
    ]
    out = call(*placed)
    # The cotangent is an input like any other: the same rounding in every dtype.
    cotangent = torch.cos(torch.arange(out.numel())).view(out.shape).to(out)
    # lora_linear's weight is frozen and gets no gradient.
    grads = torch.autograd.grad(out, placed, cotangent, allow_unused=True)
    return [t.detach().double().cpu() for t in (out, *grads) if t is not None]


def relative(out: Tensor, reference: Tensor) -> float:
    return ((out - reference).norm() / reference.norm().clamp_min(1e-300)).item()


def check_ops(device: str) -> list[dict]:
    rows = []
    for name, (call, inputs, exact) in op_cases(torch.Generator().manual_seed(0)).items():
        for dtype, limit in TOLERANCE.items():
            rounded = [x.to(dtype).double() if i not in exact else x for i, x in enumerate(inputs)]
            reference = run_op(call, rounded, exact, "cpu", torch.float64)
            first = run_op(call, rounded, exact, device, dtype)
            again = run_op(call, rounded, exact, device, dtype)
            error = max(relative(a, b) for a, b in zip(first, reference, strict=True))
            same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            rows.append(
                {
                    "check": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "error": error,
                    "limit": limit,
                    "repeatable": same,
                    "passed": error <= limit and same,
                }
            )
    return rows


def median_seconds(call: Callable[[], object], device: str, repeats: int) -> float:
    times = []
    for turn in range(repeats + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        if turn >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.no_grad()
def compare_hypernetwork(device: str, layers: int, tokens: int, repeats: int) -> dict:
    """500M shape, batch 1, bfloat16 on a GPU: median seconds of both op orders in one run."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    network = HyperNetwork(HypernetConfig(960, layers, {"down_proj": (2560, 960)}))
    for value in network.scaler_B.values():
        value.fill_(1.0)
    network = network.to(device, dtype).eval()
    features = torch.randn(1, layers, tokens, 960, device=device, dtype=dtype)
    theirs = released.hypernetwork(network, features)
    ours = network(features)
    error = max(
        relative(ours.A["down_proj"].double().cpu(), theirs[0]["down_proj"].double().cpu()),
        relative(ours.B["down_proj"].double().cpu(), theirs[1]["down_proj"].double().cpu()),
    )
    passed = error <= 2 * TOLERANCE[dtype]
    row = {"tokens": tokens, "layers": layers, "error": error, "passed": passed}
    if passed:
        row["released_seconds"] = median_seconds(
            lambda: released.hypernetwork(network, features), device, repeats
        )
        row["ours_seconds"] = median_seconds(lambda: network(features), device, repeats)
        row["speedup"] = row["released_seconds"] / row["ours_seconds"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, nargs="+", default=[832, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU is visible to torch; --device cpu --layers 2 tries the script without one")
    report = {
        **environment(args.device),
        "checks": check_ops(args.device),
        "hypernetwork": [
            compare_hypernetwork(args.device, args.layers, tokens, args.repeats)
            for tokens in args.tokens
        ],
    }
    text = json.dumps(report, indent=2)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")
    failed = [r for r in (*report["checks"], *report["hypernetwork"]) if not r["passed"]]
    if failed:
        sys.exit(f"{len(failed)} checks failed")


if __name__ == "__main__":
    main()
