"""Times candidate tiles of every kernel on the GPU at hand and writes them as data.

For each entry of ``csrc_triton/configs/<op>.json`` (a shape under ``where``) the candidates around
its tile are timed on that shape. A candidate replaces the entry when its result is right and it is
at least MARGIN faster. Then ``faster.json`` gets, for this architecture, the shapes at which the
kernels beat the reference. Half precision only; nothing is tuned while a model runs.

    python -m bench.tune [--op lora_linear] [--dry-run]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.backends import backend
from bench.checks import limit, relative_error
from bench.timing import captured, together
from csrc_triton import configs, lora_linear, perceiver_attention, rank_projection, reference
from csrc_triton.backend import capability

OPS = ("perceiver_attention", "rank_projection", "lora_linear")
# A replacement must be this much faster than what it replaces, more than times vary.
MARGIN = 0.03
# Keys of a tile and the values tried for them; each kernel has some of them.
CHOICES: dict[str, Sequence[int]] = {
    "BLOCK_P": (16, 32, 64, 128),
    "BLOCK_S": (16, 32, 64, 128),
    "BLOCK_M": (16, 32, 64, 128),
    "BLOCK_N": (16, 32, 64, 128, 256),
    "BLOCK_K": (32, 64, 128, 256),
    "BLOCK_T": (16, 32, 64, 128),
    "BLOCK_E": (16, 32, 64),
    "num_warps": (4, 8),
    "num_stages": (1, 2, 3, 4),
}
FOLDER = Path(configs.__file__).parent
D_IN, D_OUT, SCALE = 2560, 960, 128.0

Entry = Mapping[str, Any]
Tile = dict[str, int]
Trial = Callable[[Tile], list[Tensor]]


def candidates(tile: Mapping[str, int]) -> Iterator[Tile]:
    """The tile itself, then its neighbors: up to two keys moved to the next value tried.

    Keys without choices (BLOCK_R, programs, VAR) stay: VAR says which inner loop an architecture
    compiles well, and one of the forms may be compiled wrong.
    """
    steps: dict[str, list[int]] = {}
    for key, now in tile.items():
        tried = CHOICES.get(key, ())
        if now in tried:
            place = tried.index(now)
            steps[key] = [tried[p] for p in (place - 1, place + 1) if 0 <= p < len(tried)]
    yield dict(tile)
    for moved in (1, 2):
        for keys in itertools.combinations(steps, moved):
            for values in itertools.product(*(steps[key] for key in keys)):
                yield {**tile, **dict(zip(keys, values, strict=True))}


def replaced(entries: Sequence[Entry], where: Mapping[str, Any], tile: Tile) -> list[Entry]:
    """The entries with ``tile`` at ``where``, added at the end when it is not there."""
    new = {"where": dict(where), "config": tile}
    if not any(entry["where"] == where for entry in entries):
        return [*entries, new]
    return [new if entry["where"] == where else entry for entry in entries]


def ranges(key: str, won: Sequence[tuple[int, bool]]) -> list[dict[str, list[int | None]]]:
    """Measured (value, kernel won) of a number, ascending -> rules of faster.json.

    A rule spans neighbors that all won; behind the largest value measured it is open.
    """
    rules: list[dict[str, list[int | None]]] = []
    before = False
    for value, wins in won:
        if wins and before:
            rules[-1][key][1] = value
        elif wins:
            rules.append({key: [value, value]})
        before = wins
    if before:
        rules[-1][key][1] = None
    return rules


# --- what is timed for an entry --------------------------------------------------------------


def trial(op: str, where: Mapping[str, Any], device: str = "cuda") -> Trial | None:
    """Runs the kernel of an entry with a given tile at the entry's shape; None: not tuned."""
    makers = {
        "perceiver_attention": _attention_trial,
        "rank_projection": _projection_trial,
        "lora_linear": _linear_trial,
    }
    return makers[op](where, device) if where.get("inputs") == "half" else None


def _rand(device: str, *shape: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device).to(torch.bfloat16)


def _attention_trial(where: Mapping[str, Any], device: str) -> Trial:
    from csrc_triton.kernels import perceiver_attention as kernels

    width = where.get("width", kernels.MAX_WIDTH)
    # Every candidate's outputs exist at once: 264 slices are four waves of two programs each.
    query, context = _rand(device, 264, 128, width) * 0.1, _rand(device, 264, 832, width)
    norm = torch.ones(264, 832, device=device)
    if where["kernel"] == "attend":
        return lambda tile: list(kernels.perceiver_attention(query, context, norm, config=tile))
    out, lse = reference.perceiver_attention(query, context, norm)
    grads = torch.ones_like(out), torch.zeros_like(lse)
    return lambda tile: list(
        kernels.perceiver_attention_backward(*grads, query, context, norm, out, lse, config=tile)
    )


def _projection_trial(where: Mapping[str, Any], device: str) -> Trial:
    from csrc_triton.kernels import rank_projection as kernels

    layers, rank = where["layers"], 16
    latents = _rand(device, where["rows"] // rank, 1, layers, rank, 512)
    head = _rand(device, layers, 512, D_IN + D_OUT)
    scaler = _rand(device, layers, rank)
    return lambda tile: list(
        kernels.rank_projection(latents, head, scaler, scaler, None, None, D_IN, D_OUT, tile)
    )


def _linear_trial(where: Mapping[str, Any], device: str) -> Trial:
    from csrc_triton.kernels import lora_linear as kernels

    kernel, rank = where["kernel"], where.get("rank", 32)
    examples, tokens = where.get("examples", 32), where.get("tokens", 1)
    d_out = where.get("d_out", D_OUT)
    a, b = _rand(device, examples, rank, D_IN), _rand(device, examples, rank, d_out) / SCALE
    index = torch.arange(examples, device=device)
    x = _rand(device, examples * tokens, D_IN)
    u = _rand(device, examples * tokens, rank)
    if kernel == "shrink":
        return lambda tile: [kernels.shrink(x, a, index, 1.0, None, None, {kernel: tile})]
    if kernel == "expand":

        def expand(tile: Tile) -> list[Tensor]:
            y = torch.zeros(examples * tokens, d_out, dtype=x.dtype, device=device)
            kernels.expand_(y, u, b, index, None, None, {kernel: tile})
            return [y]

        return expand
    if kernel == "reduce":
        order, bounds = kernels.examples_by_adapter(index, examples)
        return lambda tile: [kernels.reduce(u, x, a, order, bounds, None, None, {kernel: tile})]
    weight = _rand(device, d_out, D_IN)
    place = capability(x.device)
    keys = {"inputs": "half", "examples": examples}
    both = {
        "decode_shrink": configs.lookup(
            "lora_linear", place, kernel="decode_shrink", rank=rank, **keys
        ),
        "decode_linear": configs.lookup(
            "lora_linear", place, kernel="decode_linear", d_out=d_out, **keys
        ),
    }
    rows = x.view(examples, 1, D_IN)
    return lambda tile: [
        kernels.lora_linear(
            rows, weight, None, a, b, index, SCALE, None, None, {**both, kernel: tile}
        )
    ]


# --- tuning ----------------------------------------------------------------------------------


def best(run: Trial, tile: Tile) -> tuple[Tile, float]:
    """The fastest right candidate, and its time over that of the tile there is."""
    wanted = [t.clone() for t in run(dict(tile))]
    calls, tiles = {}, {}
    for candidate in candidates(tile):
        name = json.dumps(candidate)
        try:
            found = run(dict(candidate))
        except Exception as problem:
            # Too much shared memory, or a tile the compiler refuses.
            print(f"  left out {name}: {(str(problem).splitlines() or ['?'])[0][:80]}")
            continue
        pairs = zip(found, wanted, strict=True)
        if all(relative_error(f, w) <= limit(torch.bfloat16) for f, w in pairs):
            calls[name], tiles[name] = captured(lambda c=candidate: run(dict(c))), candidate
    times = together(calls, "cuda", seconds=0.02, most=30)
    first = min(times, key=times.__getitem__)
    return tiles[first], times[first] / times[json.dumps(dict(tile))]


def tune(op: str, section: str) -> list[Entry]:
    """The entries of a section of an op's file, better ones in place of those beaten."""
    entries = list(configs.table(op)[section])
    for entry in list(entries):
        where = entry["where"]
        run = trial(op, where)
        if run is None:
            continue
        tile, ratio = best(run, dict(entry["config"]))
        keeps = ratio > 1 - MARGIN
        print(f"{op} {where}: {'kept' if keeps else f'{tile}, {ratio:.2f} of the time'}")
        if not keeps:
            entries = replaced(entries, where, tile)
        torch.cuda.empty_cache()
    return entries


def wins(op: str) -> list[dict[str, Any]]:
    """Rules of faster.json for this GPU: one number of the shape measured at a time."""
    rules: list[dict[str, Any]] = []
    if op == "perceiver_attention":
        for slices, tokens in ((1, (832, 4096, 65536)), (32, (832, 4096)), (1536, (832,))):
            won = []
            for count in tokens:
                q, c = _rand("cuda", slices, 128, 512) * 0.1, _rand("cuda", slices, count, 512)
                norm = torch.ones(slices, count, device="cuda")
                # One rule serves both directions.
                both = (_wins(perceiver_attention, [q, c, norm], n) for n in ((), (0, 1)))
                won.append((count, all(both)))
            fixed = {"slices": [slices, None if slices == 1536 else slices], "width": [512, 512]}
            rules += [{**fixed, **rule} for rule in ranges("tokens", won)]
    elif op == "rank_projection":
        for layers in (1, 32):
            won = []
            for rows in (16, 64, 128, 1024):
                latents = _rand("cuda", rows // 16, 1, layers, 16, 512)
                scaler = _rand("cuda", layers, 16)
                inputs = [latents, _rand("cuda", layers, 512, D_IN + D_OUT), scaler, scaler]

                def project(*t: Tensor) -> tuple[Tensor, Tensor]:
                    return rank_projection(*t, d_in=D_IN, d_out=D_OUT)

                won.append((rows, _wins(project, inputs, ())))
            fixed = {"direction": "forward", "layers": [layers, layers]}
            rules += [{**fixed, **rule} for rule in ranges("rows", won)]
    else:
        weight = _rand("cuda", D_OUT, D_IN)
        for direction, needs in (("forward", ()), ("backward", (0, 1, 2))):
            won = []
            for examples, tokens in ((1, 1), (32, 1), (32, 32), (32, 256)):
                index = torch.arange(examples, device="cuda")

                def adapt(x: Tensor, a: Tensor, b: Tensor, index: Tensor = index) -> Tensor:
                    return lora_linear(x, weight, None, a, b, index, SCALE)

                inputs = [_rand("cuda", examples, tokens, D_IN), _rand("cuda", examples, 32, D_IN),
                          _rand("cuda", examples, 32, D_OUT) / SCALE]  # fmt: skip
                won.append((examples * tokens, _wins(adapt, inputs, needs)))
            rules += [{"direction": direction, **rule} for rule in ranges("rows", won)]
    return rules


def _wins(function: Callable, inputs: Sequence[Tensor], needs: Sequence[int]) -> bool:
    """Whether the kernels beat the reference, forward and (with ``needs``) backward."""
    for i in needs:
        inputs[i].requires_grad_()

    def run(name: str) -> None:
        with backend(name):
            out = function(*inputs)
            first = out if isinstance(out, Tensor) else out[0]
            if needs:
                torch.autograd.grad(first, [inputs[i] for i in needs], torch.ones_like(first))

    calls = {name: (lambda n=name: run(n)) for name in ("triton", "reference")}
    times = together(calls, "cuda", seconds=0.05)
    return times["triton"] < (1 - MARGIN) * times["reference"]


def dump(table: Mapping[str, Sequence[Entry]]) -> str:
    """A configuration file, one entry a line."""
    sections = [
        f'  "{name}": [' + ",".join(f"\n    {json.dumps(entry)}" for entry in entries) + "\n  ]"
        for name, entries in table.items()
    ]
    return "{\n" + ",\n".join(sections) + "\n}\n"


def save(name: str, text: str) -> None:
    path = FOLDER / f"{name}.json"
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=OPS, action="append", help="all when omitted")
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tuning times kernels and needs a GPU; none is visible to torch")
    section = configs.architecture(torch.cuda.get_device_capability())
    faster = {name: dict(rules) for name, rules in configs.table("faster").items()}
    for op in options.op or OPS:
        entries = tune(op, section)
        if not options.dry_run:
            save(op, dump({**configs.table(op), section: entries}))
            # What follows is launched with the new tiles.
            configs.table.cache_clear()
            configs._nearest.cache_clear()
        faster.setdefault(section, {})[op] = wins(op)
        print(f"{op} beats the reference at {faster[section][op]}")
    if not options.dry_run:
        save("faster", json.dumps(faster, indent=2) + "\n")


if __name__ == "__main__":
    main()
