"""The hypernetwork at the 500M shape: the released op order in one batch, and ours in three forms.

The hypernetwork alone, random weights, one video. ``released`` has the features of all layers at
once and runs ``bench/released.py`` in float32. The others get the features of one layer at a time,
as the decoder produces them, in the order of the pipeline: ``layers`` one by one, as before layers
were grouped; ``groups`` as many at once as a group has tokens for; ``groups, bfloat16`` the
same with bfloat16 features. Each runs in a process of its own, and they take turns; peak resident
memory includes the weights. Seconds are CPU time of all threads, the least of the rounds, because
wall time depends on what else runs. A thread that waits for another one sleeps
(``OMP_WAIT_POLICY=passive``, unless the environment says otherwise); by default it spins, and what
else runs would count as CPU time, too. Ratios are stored only if the adapters agree.

Beside the seconds are those that the products alone would take, one after the other, as PyTorch
multiplies two plain matrices: the same matrices again and again, which a cache may hold, and
matrices that come from memory, as they do in a network whose weights and contexts no cache holds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Generator
from dataclasses import replace
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
from v2l_fast.hypernet.adapter import LayerFactors
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.tensor_files import save_tensors
from v2l_fast.work_units import (
    label_units,
    layers_per_group,
    run_to_completion,
    token_chunks,
    tokens_per_group,
    tokens_per_unit,
)

EXAMPLES = """
  python -m bench.runs.hypernet_streaming
  python -m bench.runs.hypernet_streaming --tokens 64 256 --threads 1"""
# Most tokens of all layers together; longer contexts have fewer layers, at least 4.
MAX_SLICES = 13500
VARIANTS = ("released", "layers", "groups", "groups, bfloat16")
# Float32 against float32 over nine blocks, and the budget of bfloat16; a structural difference is
# 0.2 or more.
ERROR_LIMITS = {"layers": 1e-5, "groups": 1e-5, "groups, bfloat16": 5e-3}


def main() -> int:
    parser = argument_parser("bench.runs.hypernet_streaming", __doc__, EXAMPLES)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[64, 256, 832, 4096], metavar="S",
        help="context tokens; default: 64 256 832 4096",
    )  # fmt: skip
    parser.add_argument("--layers", type=int, default=32, help="at most; default: 32")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each; default: 1")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--out", type=Path, default=RESULTS / "hypernet_streaming.json")
    parser.add_argument("--run", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--factors", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        row = measure(
            options.run, options.tokens[0], options.layers, options.threads, options.factors
        )
        print(json.dumps(row))
        return 0
    policy = os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    rows = [
        compare(tokens, options.layers, options.threads, options.rounds)
        for tokens in options.tokens
    ]
    record = {"benchmark": "hypernet_streaming", **environment(), "threads": options.threads}
    write_record({**record, "wait_policy": policy, "rows": rows}, options.out)
    return 0 if all(row["correct"] for row in rows) else 1


def compare(tokens: int, layers: int, threads: int, rounds: int) -> dict[str, Any]:
    """All variants at S tokens, and their ratios to ``released`` if they agree with it."""
    layers = min(layers, max(4, MAX_SLICES // tokens))
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {variant: Path(folder) / f"{variant}.safetensors" for variant in VARIANTS}
        for _ in range(rounds):
            for variant, factors in files.items():
                arguments = ["--run", variant, "--tokens", str(tokens), "--layers", str(layers)]
                arguments += ["--factors", str(factors)]
                run = run_module("bench.runs.hypernet_streaming", arguments, threads)
                if variant not in figures or run["seconds"] < figures[variant]["seconds"]:
                    figures[variant] = run
        for variant, file in files.items():
            figures[variant]["relative_error"] = difference(files["released"], file)
    correct = all(figures[name]["relative_error"] <= most for name, most in ERROR_LIMITS.items())
    for variant, own in figures.items():
        if correct:
            for name in ("seconds", "peak_bytes"):
                own[f"{name}_ratio"] = own[name] / figures["released"][name]
        ratio = f"{own['seconds_ratio']:5.2f}" if correct else "WRONG"
        print(
            f"S = {tokens:5d}  {variant:16s} {own['seconds']:8.2f} s  {ratio}   "
            f"peak {own['peak_bytes'] / 2**30:5.2f} GiB   error {own['relative_error']:.1e}   "
            f"products with the context {own['product_share']:.0%}, "
            f"all {own['all_product_share']:.0%}, from memory {own['memory_product_share']:.0%}",
            flush=True,
        )
    for variant in ("groups", "groups, bfloat16"):
        print(f"  {variant}, GFLOP/s of a plain product:")
        for product in figures[variant]["products"]:
            shape = " x ".join(map(str, product["shape"]))
            print(
                f"    {product['name']:22s} {shape:20s} {product['dtype']:9s} "
                f"{product['gflops']:7.1f}   from memory {product['memory_gflops']:7.1f}",
                flush=True,
            )
    return {
        "tokens": tokens, "layers": layers, "load": os.getloadavg()[0], "correct": correct,
        "variants": figures,
    }  # fmt: skip


def difference(first: Path, second: Path) -> float:
    """Largest relative difference of a factor in the Frobenius norm."""
    one, other = load_file(first), load_file(second)
    return max(((other[k] - one[k]).norm() / one[k].norm()).item() for k in one)


def measure(variant: str, tokens: int, layers: int, threads: int, factors: Path) -> dict[str, Any]:
    """Seconds and bytes of one variant in this process; writes its adapter to ``factors``."""
    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if variant.endswith("bfloat16") else torch.float32
    text = SHAPES["500M"].text | {"num_hidden_layers": layers}
    network = random_hypernet(replace(SHAPES["500M"], text=text)).for_inference("cpu", dtype)
    config = network.config

    def layer_input(index: int, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(1, length, config.hidden_size, generator=generator).to(dtype)

    budget = tokens_per_group(torch.device("cpu"), False, dtype)
    size = layers_per_group(tokens, layers, budget) if variant.startswith("groups") else 1

    @torch.inference_mode()
    def run(length: int) -> tuple[dict, dict, float]:
        if variant == "released":
            features = torch.stack([layer_input(i, length) for i in range(layers)], 1)
            start = time.process_time()
            a, b = released.hypernetwork(network, features)
            return a, b, time.process_time() - start
        chunks = list(token_chunks(length, tokens_per_unit(torch.device("cpu"))))
        per_layer: list[LayerFactors] = []
        seconds = 0.0
        for first in range(0, layers, size):
            inputs = [layer_input(i, length) for i in range(first, min(first + size, layers))]
            start = time.process_time()
            if len(chunks) == 1:
                per_layer += network.group(first, inputs)
            else:
                units = network.iter_layer(first, inputs[0], None, None, chunks)
                per_layer.append(run_units(units))
            seconds += time.process_time() - start
        batch = network.assemble(per_layer)
        return dict(batch.A), dict(batch.B), seconds

    run(8)
    before = peak_bytes()
    a, b, seconds = run(tokens)
    peak = peak_bytes()
    save_tensors({"A": a["down_proj"].float(), "B": b["down_proj"].float()}, factors)
    products = plain_products(network, tokens, size if variant != "released" else layers, dtype)
    own_rate = product_seconds(products[:-1], "gflops")
    # The latents' products, which are small, at the rate of the attention's.
    attention = [product for product in products if product["name"].startswith("attention")]
    flops = sum(product["flops"] for product in attention)
    latents = products[-1]["flops"] * product_seconds(attention, "gflops") / flops
    return {
        "seconds": seconds,
        "product_share": own_rate * layers / seconds,
        "all_product_share": (own_rate + latents) * layers / seconds,
        "memory_product_share": product_seconds(products, "memory_gflops") * layers / seconds,
        "products": products,
        "peak_bytes": peak,
        "added_bytes": peak - before,
    }


def product_seconds(products: list[dict[str, Any]], rate: str) -> float:
    """CPU seconds of one layer's products at their rates."""
    return sum(product["flops"] / product[rate] for product in products) / 1e9


@torch.inference_mode()
def plain_products(
    network: HyperNetwork, tokens: int, size: int, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """One layer's products and the rates, in GFLOP per CPU second, of plain ones of their shapes.

    With the context: the modality projection in ``dtype``, and two products of all blocks' absorbed
    attention in float32. The latents of ``size`` layers take part in all others, which are so small
    that reading their weights bounds them; the shape of most stands for all.
    """
    config = network.config
    d, z, rows = config.hidden_size, config.latent_size, config.num_heads * config.num_latents
    length, wide = min(tokens, 1024), torch.float32
    # More than the caches hold.
    other = torch.ones(2**25)

    def seconds(m: int, k: int, n: int, kind: torch.dtype, from_memory: bool) -> float:
        x, w = torch.randn(m, k).to(kind), torch.randn(n, k).to(kind)
        times = []
        for _ in range(6):
            if from_memory:
                other.add_(1)
            start = time.process_time()
            x @ w.T
            times.append(time.process_time() - start)
        return min(times)

    def product(name: str, flops: int, m: int, k: int, n: int, kind: torch.dtype) -> dict[str, Any]:
        rates = [2 * m * k * n / seconds(m, k, n, kind, cold) / 1e9 for cold in (False, True)]
        return {
            "name": name, "shape": [m, k, n], "dtype": str(kind).removeprefix("torch."),
            "flops": flops, "gflops": rates[0], "memory_gflops": rates[1],
        }  # fmt: skip

    scores = 2 * config.num_blocks * tokens * rows * z
    return [
        product("gate and up projection", 2 * tokens * 2 * d * 4 * d, length, d, 4 * d, dtype),
        product("down projection", 2 * tokens * 4 * d * z, length, 4 * d, z, dtype),
        product("attention scores", scores, rows, z, length, wide),
        product("attention means", scores, rows, length, z, wide),
        product("latents", latent_flops(network), size * config.num_latents, z, 4 * z, wide),
    ]


def latent_flops(network: HyperNetwork) -> int:
    """FLOPs of one layer's products without the context.

    The absorbed form multiplies by the key and value projections once for every query head.
    """
    config = network.config
    z, outputs = config.latent_size, config.rank * len(config.target_modules)
    width = config.num_heads * config.head_dim

    def block(queries: int, seen: int) -> int:
        """Queries, keys, values, output, SwiGLU, and the scores and means of ``seen`` latents."""
        weights = 4 * width * z + 3 * 4 * z * z
        return 2 * queries * weights + 4 * config.num_heads * queries * seen * z

    encoder = config.num_blocks * (1 + config.num_self_attn_per_block)
    flops = encoder * block(config.num_latents, config.num_latents)
    flops += block(outputs, config.num_latents + outputs)
    flops += 2 * outputs * config.num_pre_head_layers * 2 * 4 * z * z
    return flops + sum(2 * config.rank * z * sum(sizes) for sizes in config.target_modules.values())


def run_units(units: Generator[None, None, LayerFactors]) -> LayerFactors:
    """The result of a generator whose units are not interleaved with anything."""
    return run_to_completion(label_units(units, ("generate adapter", 0, 0)))


if __name__ == "__main__":
    sys.exit(main())
