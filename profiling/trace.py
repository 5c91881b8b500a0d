"""Where the time of internalizing, of an answer or of a training step goes, op by op.

Runs the job once to warm up and once under torch.profiler, on models of random weights and videos
of random pixels. Writes into a folder:

  trace.json.gz   the Chrome trace; ui.perfetto.dev opens it
  profile.json    ranges and ops with calls, seconds and, with --memory, bytes
  memory.png      with --memory: bytes allocated over time, above those at the start
  memory.pickle   with --memory on a GPU: every block with its stack, for pytorch.org/memory_viz

The videos are frames in memory: reading and resizing files is left out. Profiling itself takes
time; bench/ measures speed.

From torch 2.15 on, a custom op whose arguments are all tensors is dispatched in Python, past the
C++ dispatcher that records an op for the profiler ("PyObject dispatcher" in torch/_ops.py). Its
kernels would then count in no op, so the profiled call dispatches our ops in C++.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile, record_function

from bench.harness import argument_parser, environment
from bench.models import QUESTION_TOKENS, random_ids
from bench.runs.train_step import CASES, Case, batch, models
from v2l_fast.console import say, show_table, waiting
from v2l_fast.data.readers import Sample
from v2l_fast.files import replacing, write_json
from v2l_fast.generation import ModelRunner, Request, SamplingParams
from v2l_fast.hypernet.adapter import AdapterBatch
from v2l_fast.hypernet.adapter_bank import AdapterBank
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.pipeline import Context, context_batches, iter_factors, visual_features
from v2l_fast.training.step import StepOptions, TrainStep
from v2l_fast.vlm.decoder import Decoder
from v2l_fast.vlm.smolvlm import SmolVLM
from v2l_fast.work_units import run_to_completion

MODELS = {name.lower(): case for name, case in CASES.items()}
# The first token and three more: steps are alike, and each adds thousands of events.
NEW_TOKENS = 4
EXAMPLES = """
  python -m profiling.trace internalize --out trace
  python -m profiling.trace ask --model 500m --device cuda --out trace
  python -m profiling.trace train --model 2.2b --device cuda --videos 12 --memory --out trace"""

Job = Callable[[], object]


# --- what is profiled ------------------------------------------------------------------------


def internalize(network: HyperNetwork, backbone: SmolVLM, video: Context) -> AdapterBatch:
    """Views to an adapter, with ranges around the vision tower and both parts of the pipeline.

    ``network`` has the backbone's dtype.
    """
    with record_function("vision"):
        features = visual_features(backbone, [video])
    (contexts,) = context_batches(backbone, [video], features)
    with (
        patch.object(backbone.decoder, "layer", _ranged(backbone.decoder.layer, "decoder layers")),
        patch.object(network, "group", _ranged(network.group, "hypernetwork layers")),
    ):
        return network.assemble(run_to_completion(iter_factors(backbone, network, contexts)))


def _ranged(function: Callable, name: str) -> Callable:
    """The function, with a range of the profiler around each call."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        with record_function(name):
            return function(*args, **options)

    return call


def job(name: str, case: Case, device: str, compile: bool) -> Job:
    """The call to profile.

    Args:
        name: "internalize" (one video), "ask" (a question with its adapter) or "train" (a step over
            ``case.videos``: forward, backward and update, with a learning rate of 0).
    """
    network, backbone = models(case, device)
    samples = batch(case, backbone)
    if compile:
        backbone.compile()
        network.compile_layers()
    if name == "train":
        options = StepOptions(recompute=case.recompute)
        return _training(TrainStep(network, backbone, options), samples)
    network = network.to(backbone.decoder.dtype).eval().requires_grad_(False)
    make = torch.inference_mode()(lambda: internalize(network, backbone, samples[0].chunks[0]))
    if name == "internalize":
        return make
    decoder = backbone.decoder
    slots = AdapterBank.pack([make()[0]], decoder.device, decoder.dtype)
    question = random_ids(backbone, QUESTION_TOKENS, torch.Generator().manual_seed(1))
    prompt = backbone.embed(question.to(decoder.device))
    return torch.inference_mode()(lambda: _answer(decoder, prompt, slots))


def _answer(decoder: Decoder, prompt: Tensor, slots: AdapterBank) -> None:
    running = ModelRunner(decoder, 1, len(prompt) + NEW_TOKENS, ())
    with record_function("first token"):
        running.prefill([Request(SamplingParams(NEW_TOKENS), slot=0)], [prompt], slots)
    for _ in range(NEW_TOKENS - 1):
        with record_function("further token"):
            running.decode(slots)


def _training(step: TrainStep, samples: Sequence[Sample]) -> Job:
    fused = step.backbone.decoder.device.type == "cuda"
    optimizer = torch.optim.AdamW(step.hypernet.parameters(), lr=0.0, fused=fused)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with record_function("forward"):
            loss = step(samples).loss
        with record_function("backward"):
            loss.backward()
        # torch adds a range for the step of the optimizer.
        optimizer.step()

    return run


# --- profiling -------------------------------------------------------------------------------


@contextlib.contextmanager
def dispatched_in_cpp() -> Iterator[None]:
    """Inside the block, the profiler records every op of ours."""
    ours = (op._opoverload for name, op in OPDEFS.items() if name.startswith("v2l::"))
    past = [op for op in ours if getattr(op, "_pyobj_dispatcher", None) is not None]
    for op in past:
        op._enable_pyobj_dispatch(False)
    try:
        yield
    finally:
        for op in past:
            op._enable_pyobj_dispatch(True)


def profiled(call: Job, device: str, memory: bool, folder: Path) -> dict[str, Any]:
    """Call once to warm up and once under the profiler; write the trace, and memory on request.

    Returns:
        "seconds" of the profiled call; "ranges", whose times include what runs inside; "ops" and,
        on a GPU, "kernels" with their own times, the longest first; with ``memory``, "peak_bytes"
        above those at the start. On a GPU the backward pass runs in its own thread, so its kernels
        count in their ops and in no range.
    """
    call()
    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    if on_gpu:
        torch.cuda.synchronize()
        if memory:
            torch.cuda.memory._record_memory_history()
    options = {"activities": activities, "record_shapes": True, "profile_memory": memory}
    with dispatched_in_cpp(), profile(**options) as profiler:
        start = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    folder.mkdir(parents=True, exist_ok=True)
    # The profiler compresses files with this suffix.
    with replacing(folder / "trace.json.gz", ".json.gz") as part:
        profiler.export_chrome_trace(str(part))
    figures = {"seconds": seconds, **summary(profiler.key_averages(), memory)}
    if memory:
        points = memory_timeline(folder / "trace.json.gz", device)
        figures["peak_bytes"] = max((total for _, total in points), default=0)
        with replacing(folder / "memory.png") as part:
            _plot(points, device, part)
        if on_gpu:
            with replacing(folder / "memory.pickle") as part:
                torch.cuda.memory._dump_snapshot(str(part))
            torch.cuda.memory._record_memory_history(enabled=None)
    return figures


def summary(events: Iterable[FunctionEventAvg], memory: bool) -> dict[str, list[dict[str, Any]]]:
    """The profiler's averages in seconds and bytes (allocated less freed), the longest first."""
    sections: dict[str, list[dict[str, Any]]] = {"ranges": [], "ops": [], "kernels": []}
    for event in events:
        on_cpu = event.device_type == DeviceType.CPU
        row = {"name": event.key, "calls": event.count}
        if event.is_user_annotation:
            if on_cpu:
                row |= _seconds(event.cpu_time_total, event.device_time_total)
                sections["ranges"].append(row)
        elif event.key != "[memory]":
            row |= _seconds(event.self_cpu_time_total, event.self_device_time_total)
            if memory and on_cpu:
                row["cpu_bytes"] = event.self_cpu_memory_usage
                row["device_bytes"] = event.self_device_memory_usage
            sections["ops" if on_cpu else "kernels"].append(row)
    for rows in sections.values():
        rows.sort(key=lambda row: (row["device_seconds"], row["cpu_seconds"]), reverse=True)
    return sections


def _seconds(cpu: float, device: float) -> dict[str, float]:
    """From the profiler's microseconds."""
    return {"cpu_seconds": cpu / 1e6, "device_seconds": device / 1e6}


def memory_timeline(trace: Path, device: str) -> list[tuple[float, int]]:
    """(seconds, bytes) after every allocation and release in a trace, relative to the first."""
    kind = 1 if device == "cuda" else 0
    with gzip.open(trace, "rt") as text:
        events = [
            (event["ts"], event["args"])
            for event in json.load(text)["traceEvents"]
            if event["name"] == "[memory]" and event["args"]["Device Type"] == kind
        ]
    events.sort(key=lambda event: event[0])
    if not events:
        return []
    start, first = events[0]
    before = first["Total Allocated"] - first["Bytes"]
    return [((ts - start) / 1e6, args["Total Allocated"] - before) for ts, args in events]


def _plot(points: Sequence[tuple[float, int]], device: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((8, 3), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.step([at * 1e3 for at, _ in points], [size / 2**20 for _, size in points], where="post")
    axes.set(xlabel="ms", ylabel=f"MiB allocated ({device})")
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png")


# --- command line ----------------------------------------------------------------------------


def _print_table(title: str, rows: Sequence[dict[str, Any]], device: str, seconds: float) -> None:
    clock = "device_seconds" if device == "cuda" else "cpu_seconds"
    cells = [
        [row["name"], f"{row['calls']:>6}", f"{row[clock] * 1e3:>10,.2f}",
         f"{row[clock] / seconds:>6.1%}"]
        for row in rows
    ]  # fmt: skip
    show_table(["name", "calls", "ms", "of the run"], cells, title)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argument_parser("profiling.trace", __doc__, EXAMPLES)
    parser.add_argument("job", choices=("internalize", "ask", "train"))
    parser.add_argument("--model", choices=MODELS, default="shapes", help="default: shapes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--frames", type=int, help="of each video; default: the model's")
    parser.add_argument("--videos", type=int, default=1, help="of a training step; default: 1")
    parser.add_argument("--compile", action="store_true", help="as on a GPU in production")
    parser.add_argument("--memory", action="store_true", help="memory over time as well")
    parser.add_argument("--top", type=int, default=15, help="ops to print; default: 15")
    parser.add_argument("--json", action="store_true", help="print profile.json, no tables")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    options = parser.parse_args(arguments)
    case = MODELS[options.model]
    case = replace(
        case,
        frames=case.frames if options.frames is None else options.frames,
        videos=options.videos if options.job == "train" else 1,
    )
    if min(case.frames, case.videos, options.top) < 1:
        parser.error("--frames, --videos and --top must be at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is visible to torch; use --device cpu")

    with waiting(f"{options.job}, {options.model}: warming up, then profiling"):
        call = job(options.job, case, options.device, options.compile)
        figures = profiled(call, options.device, options.memory, options.out)
    record = {
        "profile": options.job, "model": options.model, "frames": case.frames,
        "videos": case.videos, "compiled": options.compile, "threads": torch.get_num_threads(),
        **environment(options.device), **figures,
    }  # fmt: skip
    write_json(options.out / "profile.json", record, allow_nan=False)
    if options.json:
        print(json.dumps(record, indent=2))
        return 0
    for title, key in (("Ranges", "ranges"), ("Ops", "ops"), ("Kernels", "kernels")):
        if figures[key]:
            _print_table(title, figures[key][: options.top], options.device, figures["seconds"])
    if options.memory:
        say(f"peak {figures['peak_bytes'] / 2**20:,.1f} MiB above the start")
    say(f"{figures['seconds']:.3f} s under the profiler; written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
