"""Times candidate tiles of every kernel on this GPU and writes the best ones as data.

For each entry of ``csrc_triton/<op>/configs.json`` (a shape under ``where``), the candidates around
its tile are timed at that shape. A candidate replaces the entry if its result is right and it is at
least MARGIN faster. On sm_90 the candidates of attend include tiles in Gluon, each after all cases
of ``bench/attention_gate.py`` in a process of its own. Then ``faster.json`` gets, for this
architecture, the shapes at which the fused path beats the reference. Half precision only; nothing
is tuned while a model runs.

Beside each measured time stands the one that ``profiling.model`` predicts for the kernel's main
loop, and measured / predicted. A timed call may hold more than that loop (products of cuBLAS, a
sum of partial results), so the ratio compares candidates of one entry. The order in which the model
puts them is judged by ``same_order``: the share of pairs that it orders as the measurement does.

The record, in bench/results, and the configuration files are written after every entry. A further
run on the same GPU and version of torch measures no entry of its record again; delete it to start
anew.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import (
    RESULTS,
    ROOT,
    argument_parser,
    backend,
    captured,
    environment,
    error_limit,
    first_line,
    median_seconds,
    relative_error,
)
from csrc_triton import device as gpu
from csrc_triton import gated_projection, lora_linear, perceiver_attention, rank_projection
from csrc_triton.perceiver_attention import reference
from v2l_fast.files import write_json, write_text

EXAMPLES = """
  python -m bench.runs.tune
  python -m bench.runs.tune --op lora_linear --dry-run
  python -m bench.runs.tune --seconds 540      starts no further entry afterwards; run it again"""
TUNED = ("perceiver_attention", "rank_projection", "lora_linear")
OPS = (*TUNED, "gated_projection")
# By how much a replacement must be faster, more than times vary.
MARGIN = 0.03
# Keys of tiles and the values to try; each kernel has some of the keys.
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
# Keys of a tile that select another form of a kernel.
FORMS = ("GLUON",)
# Compiling and running all cases of another form; more is a hang.
GATE_SECONDS = 300
FOLDER = Path(gpu.__file__).parent
D_IN, D_OUT, SCALE = 2560, 960, 128.0
# Of the attention whose tiles are tuned: slices, rows and tokens. Every candidate's outputs exist
# at once: 264 slices are four waves of two programs each.
SLICES, ROWS, TOKENS = 264, 128, 832
EXAMPLES_TUNED = 32
# d_in of a model -> its d_out.
WIDTHS = {D_IN: D_OUT, 8192: 2048}
# (first, measured, last number of tokens) -> numbers of slices to measure.
ATTENTION: dict[tuple[int, int, int | None], Sequence[int]] = {
    (256, 832, 2047): (1, 8, 32, 256, 1536),
    (2048, 4096, 16383): (1, 8, 32, 256),
    (16384, 65536, None): (1, 32),
}

Entry = Mapping[str, Any]
Tile = dict[str, int]
Trial = Callable[[Tile], list[Tensor]]


def candidates(tile: Mapping[str, int]) -> Iterator[Tile]:
    """The tile itself, then its neighbors, with one or two keys moved to the next choice.

    Keys without choices (BLOCK_R, programs, VAR) stay: VAR selects the inner loop that an
    architecture compiles well, and another one may be compiled wrong.
    """
    steps: dict[str, list[int]] = {}
    for key, now in tile.items():
        tried = CHOICES.get(key, ())
        if now in tried:
            index = tried.index(now)
            steps[key] = [tried[i] for i in (index - 1, index + 1) if 0 <= i < len(tried)]
    yield dict(tile)
    for moved in (1, 2):
        for keys in itertools.combinations(steps, moved):
            for values in itertools.product(*(steps[key] for key in keys)):
                yield {**tile, **dict(zip(keys, values, strict=True))}


def replaced(entries: Sequence[Entry], where: Mapping[str, Any], tile: Tile) -> list[Entry]:
    """The entries with ``tile`` at ``where``, appended if no entry is for that shape."""
    new = {"where": dict(where), "config": tile}
    if not any(entry["where"] == where for entry in entries):
        return [*entries, new]
    return [new if entry["where"] == where else entry for entry in entries]


def ranges(key: str, won: Sequence[tuple[int, bool]]) -> list[dict[str, list[int | None]]]:
    """Rules of faster.json from (value, kernel won) in ascending order of the value.

    A rule spans neighbors that all won; one that reaches the largest value is open at its end.
    """
    rules: list[dict[str, list[int | None]]] = []
    before = False
    for value, faster in won:
        if faster and before:
            rules[-1][key][1] = value
        elif faster:
            rules.append({key: [value, value]})
        before = faster
    if before:
        rules[-1][key][1] = None
    return rules


def other_forms(op: str, section: str, where: Mapping[str, Any]) -> list[Tile]:
    """Candidates of another form of the kernel, which no test has run; see :func:`is_right`."""
    kernels = importlib.import_module(f"csrc_triton.{op}.kernels")
    return kernels.alternatives(section, where) if hasattr(kernels, "alternatives") else []


def is_right(where: Mapping[str, Any], tile: Tile) -> bool:
    """Whether a tile of another form passes its gate; prints what is wrong.

    In a process of its own: a kernel that hangs or breaks the device ends only that.
    """
    command = [sys.executable, "-m", "bench.attention_gate", str(where["width"]), json.dumps(tile)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=GATE_SECONDS
        )
        lines = done.stdout.splitlines()
        wrong = lines or (
            [] if done.returncode == 0 else done.stderr.splitlines()[-1:] or ["ended"]
        )
    except subprocess.TimeoutExpired:
        wrong = [f"not through its cases after {GATE_SECONDS} s"]
    for line in wrong[:5]:
        print(f"  left out {json.dumps(tile)}: {line}")
    return not wrong


# --- what is timed for an entry --------------------------------------------------------------


def trial(op: str, where: Mapping[str, Any], device: str = "cuda") -> Trial | None:
    """A function that runs an entry's kernel at its shape with any tile; None if not tuned."""
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
    from csrc_triton.perceiver_attention import kernels

    width = where.get("width", kernels.MAX_WIDTH)
    query = _rand(device, SLICES, ROWS, width) * 0.1
    context = _rand(device, SLICES, TOKENS, width)
    norm = torch.ones(SLICES, TOKENS, device=device)
    if where["kernel"] == "attend":
        return lambda tile: list(kernels.perceiver_attention(query, context, norm, config=tile))
    out, lse = reference.perceiver_attention(query, context, norm)
    grads = torch.ones_like(out), torch.zeros_like(lse)
    return lambda tile: list(
        kernels.perceiver_attention_backward(*grads, query, context, norm, out, lse, config=tile)
    )


def _projection_trial(where: Mapping[str, Any], device: str) -> Trial:
    from csrc_triton.rank_projection import kernels

    rank = 16
    latents, head = (
        _rand(device, where["rows"] // rank, rank, 512),
        _rand(device, 512, D_IN + D_OUT),
    )
    scaler = _rand(device, rank)
    return lambda tile: list(
        kernels.rank_projection(latents, head, scaler, scaler, D_IN, D_OUT, tile)
    )


def _linear_trial(where: Mapping[str, Any], device: str) -> Trial:
    from csrc_triton.lora_linear import kernels

    kernel, rank = where["kernel"], where.get("rank", 32)
    examples, tokens = where.get("examples", EXAMPLES_TUNED), where.get("tokens", 1)
    d_in = where.get("width", D_IN)
    d_out = where.get("d_out", WIDTHS[d_in])
    a, b = _rand(device, examples, rank, d_in), _rand(device, examples, rank, d_out) / SCALE
    index = torch.arange(examples, device=device)
    x = _rand(device, examples * tokens, d_in)
    u = _rand(device, examples * tokens, rank)
    weight = _rand(device, d_out, d_in)
    at = index, SCALE, None
    if kernel == "shrink":
        return lambda tile: [kernels.shrink(x, a, index, 1.0, None, {kernel: tile})]
    if kernel == "expand":

        def expand(tile: Tile) -> list[Tensor]:
            y = torch.zeros(examples * tokens, d_out, dtype=x.dtype, device=device)
            kernels.expand_(y, u, b, index, None, {kernel: tile})
            return [y]

        return expand
    if kernel == "reduce":
        order, bounds = kernels.examples_by_adapter(index, examples)
        return lambda tile: [kernels.reduce(u, x, a, order, bounds, None, {kernel: tile})]
    args = x.view(examples, 1, d_in), weight, None, a, b, *at, False
    return lambda tile: [kernels.lora_linear(*args, {kernel: tile})[0]]


# --- predictions ------------------------------------------------------------------------------


def programs(op: str, where: Mapping[str, Any], tile: Mapping[str, int]) -> int:
    """Programs that a trial launches, each as large as the case of ``aot_case``."""
    rank, tokens = where.get("rank", 32), where.get("tokens", 1)
    examples, d_in = where.get("examples", EXAMPLES_TUNED), where.get("width", D_IN)
    d_out = where.get("d_out", WIDTHS[d_in]) if op == "lora_linear" else D_OUT
    block_r = min(tile.get("BLOCK_R", rank), max(16, 1 << (rank - 1).bit_length()))
    axes = {
        "attend": (SLICES, (ROWS, "BLOCK_P")),
        "score_gradients": (SLICES, (ROWS, "BLOCK_P"), (TOKENS, "BLOCK_S")),
        "project": ((where.get("rows", 1), "BLOCK_M"), (D_IN + D_OUT, "BLOCK_N")),
        "shrink": (examples, (tokens, "BLOCK_T"), (rank, block_r)),
        "expand": (examples, (tokens, "BLOCK_T"), (d_out, "BLOCK_N")),
        "reduce": (examples, (rank, block_r), (d_in, "BLOCK_N")),
        "decode_shrink": (examples, (rank, block_r)),
        "decode_expand": (examples, (d_out, "BLOCK_N")),
    }[where.get("kernel", "project")]
    counts: list[int] = []
    for axis in axes:
        length, block = axis if isinstance(axis, tuple) else (axis, 1)
        counts.append(-(-length // (tile[block] if isinstance(block, str) else block)))
    return math.prod(counts)


def predict(
    op: str, section: str, where: Mapping[str, Any], tile: Tile, processors: int
) -> float | None:
    """Predicted seconds of a candidate's main loops; None where the model cannot say.

    Compiles the kernel again, to read its machine code.
    """
    from csrc_triton.aot import SECTIONS
    from profiling import aot_report

    kernels = importlib.import_module(f"csrc_triton.{op}.kernels")
    try:
        case = kernels.aot_case(SECTIONS[section], where, tile)
        resources = aot_report.measure(case, predict=True)
    except Exception:
        # A tile that does not compile has no time either; no disassembler, no prediction.
        return None
    return aot_report.predicted_seconds(case, resources, programs(op, where, tile), processors)


# --- tuning ----------------------------------------------------------------------------------


class TuneRecord:
    """What was measured on a GPU, written after every entry.

    Attributes:
        record: ``entries`` with their candidates, and ``wins`` by op.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: dict[str, Any] = {
            "benchmark": "tune", **environment("cuda"), "entries": [], "wins": {},
        }  # fmt: skip
        if path.exists():
            earlier = json.loads(path.read_text())
            if all(earlier.get(key) == self.record[key] for key in ("device", "torch")):
                self.record |= {key: earlier[key] for key in ("entries", "wins")}

    def candidates(self, op: str, where: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """Of an entry, the shipped tile first; None if it was not measured."""
        rows = (row for row in self.record["entries"] if (row["op"], row["where"]) == (op, where))
        return next((row["candidates"] for row in rows), None)

    def add(self, op: str, where: Mapping[str, Any], tiles: Sequence[dict[str, Any]]) -> None:
        row = {"op": op, "where": where, "same_order": same_order(tiles)}
        self.record["entries"].append({**row, "candidates": tiles})
        self.write()

    def write(self) -> None:
        write_json(self.path, self.record, allow_nan=False)


def same_order(tiles: Sequence[Mapping[str, Any]]) -> float | None:
    """Share of the pairs of tiles that prediction and measurement order alike."""
    known = [(t["predicted"], t["measured"]) for t in tiles if t["predicted"] is not None]
    pairs = [(a, b) for a, b in itertools.combinations(known, 2) if a[0] != b[0] and a[1] != b[1]]
    if not pairs:
        return None
    return sum((a[0] < b[0]) == (a[1] < b[1]) for a, b in pairs) / len(pairs)


def measured(run: Trial, tiles: Sequence[Tile]) -> list[tuple[Tile, float]]:
    """The candidates whose result is that of the first one, and their seconds, in their order."""
    expected = [t.clone() for t in run(dict(tiles[0]))]
    calls, right = {}, {}
    for candidate in tiles:
        name = json.dumps(candidate)
        try:
            outputs = run(dict(candidate))
        except Exception as error:
            # Too much shared memory, or a tile that the compiler refuses.
            print(f"  left out {name}: {first_line(error)}")
            continue
        pairs = zip(outputs, expected, strict=True)
        if all(relative_error(a, e) <= error_limit(torch.bfloat16) for a, e in pairs):
            calls[name], right[name] = captured(lambda c=candidate: run(dict(c))), candidate
    times = median_seconds(calls, "cuda", seconds=0.02, most=30)
    return [(right[name], seconds) for name, seconds in times.items()]


def compared(
    times: Sequence[tuple[Tile, float]], predictions: Mapping[str, Future[float | None]]
) -> list[dict[str, Any]]:
    """Each candidate with its measured and predicted seconds and their ratio, printed."""
    rows = []
    for tile, seconds in times:
        expected = predictions[json.dumps(tile)].result()
        ratio = None if expected is None else seconds / expected
        rows.append({"tile": tile, "measured": seconds, "predicted": expected, "ratio": ratio})
    print(f"{'measured us':>13} {'predicted us':>13} {'ratio':>7}  tile")
    for row in sorted(rows, key=lambda row: row["measured"]):
        columns = ("-", "-")
        if row["predicted"] is not None:
            columns = f"{row['predicted'] * 1e6:.2f}", f"{row['ratio']:.2f}"
        print(f"{row['measured'] * 1e6:13.2f} {columns[0]:>13} {columns[1]:>7}  {row['tile']}")
    return rows


def tune(
    op: str, section: str, record: TuneRecord, end: float, dry_run: bool, pool: Executor
) -> bool:
    """Replace the beaten entries of a section of an op's file; False if time ended before."""
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    entries = list(gpu.table(op)[section])
    for entry in list(entries):
        where, shipped = entry["where"], dict(entry["config"])
        # Another form must win against this one anew.
        usual = {key: value for key, value in shipped.items() if key not in FORMS}
        rows = record.candidates(op, where)
        if rows is None:
            if time.monotonic() > end:
                return False
            run = trial(op, where)
            if run is None:
                continue
            others = [tile for tile in other_forms(op, section, where) if is_right(where, tile)]
            tiles = [*candidates(usual), *others]
            # Computed on the CPU beside the measurement.
            predictions = {
                json.dumps(tile): pool.submit(predict, op, section, where, tile, processors)
                for tile in tiles
            }
            times = measured(run, tiles)
            print(f"{op} {where}:")
            rows = compared(times, predictions)
            record.add(op, where, rows)
        first = min(rows, key=lambda row: row["measured"])
        tile, ratio = first["tile"], first["measured"] / rows[0]["measured"]
        better = ratio <= 1 - MARGIN
        if not better:
            tile = usual
        print(f"  {f'{tile}, {ratio:.2f} of the time' if better else 'kept'}")
        if tile != shipped:
            entries = replaced(entries, where, tile)
            if not dry_run:
                save(op, dump({**gpu.table(op), section: entries}))
        torch.cuda.empty_cache()
    # Later launches use the new tiles.
    gpu.clear_cache()
    return True


def wins(op: str) -> list[dict[str, Any]]:
    """Rules of faster.json for this GPU; one number of the shape varies at a time."""
    rules = {
        "perceiver_attention": _attention_wins,
        "rank_projection": _projection_wins,
        "lora_linear": _linear_wins,
        "gated_projection": _gated_wins,
    }[op]()
    return [{"inputs": "half", **rule} for rule in rules]


def _attention_wins() -> Iterator[dict[str, Any]]:
    for (low, tokens, high), counts in ATTENTION.items():
        won = []
        for slices in counts:

            def inputs(n: int = slices, s: int = tokens) -> list[Tensor]:
                query, context = _rand("cuda", n, 128, 512) * 0.1, _rand("cuda", n, s, 512)
                return [query, context, torch.ones(n, s, device="cuda")]

            # A rule holds for both directions.
            both = (_wins(perceiver_attention, inputs, needs) for needs in ((), (0, 1)))
            won.append((slices, all(both)))
        fixed = {"tokens": [low, high], "width": [512, 512]}
        yield from ({**fixed, **rule} for rule in ranges("slices", won))


def _projection_wins() -> Iterator[dict[str, Any]]:
    """Forward only: the backward pass consists of matrix products on both paths."""
    won = []
    for rows in (16, 64, 128, 1024):

        def inputs(rows: int = rows) -> list[Tensor]:
            scaler = _rand("cuda", 16)
            return [_rand("cuda", rows // 16, 16, 512), _rand("cuda", 512, D_IN + D_OUT),
                    scaler, scaler]  # fmt: skip

        def project(*t: Tensor) -> tuple[Tensor, Tensor]:
            return rank_projection(*t, d_in=D_IN, d_out=D_OUT)

        won.append((rows, _wins(project, inputs, ())))
    yield from ({"direction": "forward", **rule} for rule in ranges("rows", won))


def _linear_wins() -> Iterator[dict[str, Any]]:
    """One token per example, for up to 64 examples and more, and longer examples."""
    decoding = [(1, 1), (8, 1), (32, 1), (64, 1), (65, 1)]
    longer = [(1, 32), (1, 256), (32, 32), (32, 256)]
    for direction, needs in (("forward", ()), ("backward", (0, 2, 3))):
        for tokens, shapes in (([1, 1], decoding), ([2, None], longer)):
            won = []
            for examples, count in shapes:

                def inputs(e: int = examples, t: int = count) -> list[Tensor]:
                    a, b = _rand("cuda", e, 32, D_IN), _rand("cuda", e, 32, D_OUT) / SCALE
                    return [_rand("cuda", e, t, D_IN), _rand("cuda", D_OUT, D_IN), a, b]

                def adapt(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
                    index = torch.arange(len(x), device=x.device)
                    return lora_linear(x, weight, None, a, b, index, SCALE)

                won.append((examples * count, _wins(adapt, inputs, needs)))
            fixed = {"direction": direction, "tokens": tokens}
            yield from ({**fixed, **rule} for rule in ranges("rows", won))


def _gated_wins() -> Iterator[dict[str, Any]]:
    won = []
    for tokens in (832, 8192, 65536):

        def inputs(tokens: int = tokens) -> list[Tensor]:
            gate, up, down = (_rand("cuda", *s) / 32 for s in ((3840, 960),) * 2 + ((512, 3840),))
            return [_rand("cuda", tokens, 960), gate, up, down]

        def project(x: Tensor, *weights: Tensor) -> Tensor:
            return gated_projection(x, None, *weights)

        both = (_wins(project, inputs, needs) for needs in ((), (1, 2, 3)))
        won.append((tokens, all(both)))
    yield from ranges("tokens", won)


def _wins(function: Callable, make: Callable[[], Sequence[Tensor]], needs: Sequence[int]) -> bool:
    """Whether the fused path beats the reference, forward or, with ``needs``, with backward."""
    inputs = make()
    for i in needs:
        inputs[i].requires_grad_()

    def run(name: str) -> None:
        with backend(name):
            out = function(*inputs)
            first = out if isinstance(out, Tensor) else out[0]
            if needs:
                torch.autograd.grad(first, [inputs[i] for i in needs], torch.ones_like(first))

    calls = {name: (lambda n=name: run(n)) for name in ("triton", "reference")}
    times = median_seconds(calls, "cuda", seconds=0.05)
    return times["triton"] < (1 - MARGIN) * times["reference"]


def dump(table: Mapping[str, Sequence[Entry]]) -> str:
    """The text of a configuration file, with one entry per line."""
    sections = [
        f'  "{name}": [' + ",".join(f"\n    {json.dumps(entry)}" for entry in entries) + "\n  ]"
        for name, entries in table.items()
    ]
    return "{\n" + ",\n".join(sections) + "\n}\n"


def save(name: str, text: str) -> None:
    write_text(FOLDER / gpu.file_of(name), text)


def main() -> None:
    parser = argument_parser("bench.runs.tune", __doc__, EXAMPLES)
    parser.add_argument("--op", choices=OPS, action="append", help="default: all")
    parser.add_argument("--dry-run", action="store_true", help="change no configuration file")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="start no further entry afterwards"
    )
    parser.add_argument("--out", type=Path, help="record; default: in bench/results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tuning times kernels and needs a GPU; none is visible to torch")
    end = time.monotonic() + options.seconds
    section = gpu.architecture(torch.cuda.get_device_capability())
    record = TuneRecord(options.out or RESULTS / f"tune_{section}.json")
    faster = {name: dict(rules) for name, rules in gpu.table("faster").items()}
    # The processes that predict do not touch the GPU.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        for op in options.op or OPS:
            complete = op not in TUNED or tune(op, section, record, end, options.dry_run, pool)
            if not complete or time.monotonic() > end:
                print(f"{op}: not complete; run again to continue")
                return
            if op not in record.record["wins"]:
                record.record["wins"][op] = wins(op)
                record.write()
            faster.setdefault(section, {})[op] = record.record["wins"][op]
            print(f"{op} beats the reference at {faster[section][op]}")
            if not options.dry_run:
                save("faster", json.dumps(faster, indent=2) + "\n")


if __name__ == "__main__":
    main()
