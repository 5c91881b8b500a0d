"""A training step: the released order against ours, on the same batch, with a split by stage.

A batch is V videos with P prompts each: V·P examples, and as many samples. Every case runs with one
prompt per video, as the paper trains, and with four; only the second gains from encoding a video
once for all its prompts. Both orders start from the same uint8 views and end after the AdamW
update.

``released``: every example has its own video through the vision tower; contexts padded to one
batch; transformers' whole decoder with the hidden states of all layers kept; the hypernetwork in
float32 over all layers at once (``bench/released.py``), nothing recomputed; adapters, with the bias
concatenated, applied by einsum; answers padded to one batch; float32 logits of all positions.
``ours``: ``v2l_fast.training.step``, a video encoded once for all its prompts. On a GPU the frozen
model is bfloat16 in both, and ours is compiled unless ``--no-compile``.

Each order runs in a process of its own, whose peak memory is recorded; on a CPU the two take turns,
step by step, so that other load hits both. In both, data workers read
the video files ahead of the step: ``decode_seconds`` are the CPU seconds for the files of a batch,
V for ours and V·P for the released order. A batch that does not fit into GPU memory is halved and
accumulated. Ratios are given only if losses and gradients agree. With one CPU thread, seconds are
those of the process rather than of the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.harness import (
    RESULTS,
    argument_parser,
    environment,
    module_process,
    peak_bytes,
    write_record,
)
from bench.models import (
    FPS,
    QUESTION_TOKENS,
    SHAPES,
    Shape,
    random_backbone,
    random_context,
    random_hypernet,
    random_ids,
    write_clip,
)
from bench.released import ReleasedStep, Stage, Step
from v2l_fast.data.readers import Sample
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.pipeline import Context, visual_features
from v2l_fast.training.step import StepOptions, TrainStep
from v2l_fast.video import frame_views, load_video
from v2l_fast.vlm.smolvlm import SmolVLM

EXAMPLES = """
  python -m bench.runs.train_step
  python -m bench.runs.train_step --device cuda --cases 500M-p1 500M"""
ORDERS = ("released", "ours")
ANSWER_TOKENS = (16, 80)
# Limit of the relative difference of loss and gradients (Frobenius norm over all parameters):
# float32 against float32, and a bfloat16 hypernetwork pass against a float32 one. A structural
# difference is 0.2 or more.
ERROR_LIMIT = {"cpu": 1e-3, "cuda": 0.1}
STAGES = (
    "vision", "text encode", "hypernetwork forward", "answer forward", "answer backward",
    "hypernetwork backward", "optimizer",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model shape and a batch of ``videos`` x ``prompts`` with ``frames`` each."""

    name: str
    shape: Shape
    hypernet: dict[str, int]
    videos: int
    prompts: int
    frames: int
    recompute: bool | None = None


def _slice(shape: Shape, layers: int, vision_layers: int) -> Shape:
    text = {**shape.text, "num_hidden_layers": layers}
    vision = {**shape.vision, "num_hidden_layers": vision_layers}
    return replace(shape, name=f"{shape.name}, {layers} layers", text=text, vision=vision)


TOY_NETWORK = {"rank": 8, "latent_size": 128, "num_blocks": 2, "num_heads": 4, "num_kv_heads": 2,
               "head_dim": 32}  # fmt: skip
CASES = {
    "shapes": Case("shapes", SHAPES["shapes"], TOY_NETWORK, 48, 4, 8),
    "500M-4": Case("500M-4", _slice(SHAPES["500M"], 4, 1), {}, 2, 4, 4),
    "500M": Case("500M", SHAPES["500M"], {}, 12, 4, 12),
    "2.2B": Case("2.2B", SHAPES["2.2B"], {}, 12, 4, 12),
    "tiny": Case("tiny", SHAPES["tiny"], {"rank": 2, "latent_size": 32, "num_blocks": 1}, 2, 2, 2),
}
# "-p1": one prompt per video; "-p1-recomputed": with recomputation of activations, which otherwise
# depends on the memory that is available.
for _name in ("shapes", "500M-4", "500M", "2.2B", "tiny"):
    _one = replace(CASES[_name], name=f"{_name}-p1", prompts=1)
    CASES[_one.name] = _one
    _recomputed = replace(_one, name=f"{_one.name}-recomputed", recompute=True)
    CASES[_recomputed.name] = _recomputed
DEFAULT = {
    "cpu": ("shapes-p1", "500M-4-p1", "500M-4-p1-recomputed", "shapes", "500M-4"),
    "cuda": ("500M-p1", "500M-p1-recomputed", "2.2B-p1", "2.2B-p1-recomputed", "500M", "2.2B"),
}


def main() -> int:
    parser = argument_parser("bench.runs.train_step", __doc__, EXAMPLES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: depends on the device")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each order")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true", help="run our order eagerly on a GPU")
    parser.add_argument("--out", type=Path, default=RESULTS / "train_step.json")
    parser.add_argument("--run", choices=ORDERS, help=argparse.SUPPRESS)
    parser.add_argument("--gradients", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        serve(options)
        return 0
    load = os.getloadavg()[0]
    rows = [
        compare(name, options.device, options.repeats, options.threads, not options.no_compile)
        for name in options.cases or DEFAULT[options.device]
    ]
    record = {"benchmark": "train_step", **environment(options.device), "threads": options.threads}
    write_record({**record, "load_average_before": load, "rows": rows}, options.out)
    return 0 if all(row["correct"] for row in rows) else 1


def compare(
    name: str, device: str, repeats: int, threads: int, compile: bool, timeout: float | None = None
) -> dict[str, Any]:
    """Both orders of one case, and their ratios if they agree.

    Raises:
        subprocess.TimeoutExpired: an order took longer than ``timeout`` seconds.
    """
    case = CASES[name]
    row: dict[str, Any] = {
        "case": name, "videos": case.videos, "prompts": case.prompts, "frames": case.frames,
        "recompute": case.recompute,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{order}.pt" for order in ORDERS]
        arguments = {
            order: ["--run", order, "--cases", name, "--device", device, "--gradients", str(path)]
            + ([] if compile else ["--no-compile"])
            for order, path in zip(ORDERS, files, strict=True)
        }
        # Two models and their activations may not fit into a GPU's memory together.
        for orders in [ORDERS] if device == "cpu" else [(order,) for order in ORDERS]:
            row |= take_turns(
                {order: arguments[order] for order in orders}, repeats, threads, timeout
            )
        for order in ORDERS:
            row[order] = figures(case, row[order])
            print(line(name, order, row[order]), flush=True)
        row |= difference(row, *files)
    row["correct"] = max(row["loss_error"], row["gradient_error"]) <= ERROR_LIMIT[device]
    if row["correct"]:
        old, new = (row[order] for order in ORDERS)
        row["speedup"] = new["samples_per_second"] / old["samples_per_second"]
        row["peak_bytes_ratio"] = new["peak_bytes"] / old["peak_bytes"]
        print(
            f"{name:14s} ours / released: {row['speedup']:.2f} x samples/s, peak memory "
            f"{row['peak_bytes_ratio']:.3f}, gradient error {row['gradient_error']:.1e}"
        )
    else:
        print(f"{name:14s} WRONG: gradient error {row['gradient_error']:.1e}, no ratios")
    return row


def take_turns(
    arguments: dict[str, list[str]], repeats: int, threads: int, timeout: float | None
) -> dict[str, Any]:
    """The reports of processes that run one step each in turn.

    Raises:
        subprocess.TimeoutExpired: they took longer than ``timeout`` seconds.
    """
    words = ["prepare", *["step"] * repeats, *["split"] * repeats, "report"]
    reports: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        runs = {
            order: stack.enter_context(module_process("bench.runs.train_step", given, threads))
            for order, given in arguments.items()
        }
        late = threading.Event()

        def end() -> None:
            late.set()
            for run in runs.values():
                run.kill()

        if timeout is not None:
            timer = threading.Timer(timeout, end)
            timer.start()
            stack.callback(timer.cancel)
        for word in words:
            for order, run in runs.items():
                assert run.stdin is not None and run.stdout is not None
                with contextlib.suppress(BrokenPipeError):
                    run.stdin.write(f"{word}\n")
                    run.stdin.flush()
                if not (reply := run.stdout.readline()):
                    if late.is_set() and timeout is not None:
                        raise subprocess.TimeoutExpired(run.args, timeout)
                    raise subprocess.CalledProcessError(run.wait(), run.args)
                reports[order] = json.loads(reply)
    return reports


def figures(case: Case, report: dict[str, Any]) -> dict[str, Any]:
    """Medians of what a process reported."""
    seconds, splits = report.pop("seconds"), report.pop("splits")
    return {
        "seconds": median(seconds),
        "all_seconds": seconds,
        "samples_per_second": case.videos * case.prompts / median(seconds),
        "stages": {stage: median(split[stage] for split in splits) for stage in STAGES},
        **report,
    }


def difference(row: dict[str, Any], first: Path, second: Path) -> dict[str, float]:
    """Relative difference of the losses, and of all gradients taken as one vector."""
    one, other = (torch.load(path, mmap=True) for path in (first, second))
    apart = sum((other[k].double() - one[k].double()).square().sum() for k in one)
    size = sum(value.double().square().sum() for value in one.values())
    losses = [row[order]["loss"] for order in ORDERS]
    return {
        "loss_error": abs(losses[1] - losses[0]) / abs(losses[0]),
        "gradient_error": (apart / size).sqrt().item(),
    }


def line(name: str, order: str, row: dict[str, Any]) -> str:
    split = "  ".join(f"{stage} {row['stages'][stage]:.3f}" for stage in STAGES)
    return (
        f"{name:14s} {order:9s} {row['samples_per_second']:8.2f} samples/s  "
        f"peak {row['peak_bytes'] / 2**30:.2f} GiB  ({split} s)"
    )


# --- one order, in its own process ----------------------------------------------------------------


def serve(options: argparse.Namespace) -> None:
    """Do what each line of standard input says; reply to each with a line of JSON.

    "prepare" writes the gradients to a file, "step" and "split" time a step, "report" ends.
    """
    torch.set_num_threads(options.threads)
    case, device = CASES[options.cases[0]], options.device
    network, backbone = models(case, device)
    samples = batch(case, backbone)
    if options.run == "released":
        # One video for each example.
        samples = [
            replace(one, qa_pairs=(pair,), task_types=("qa",))
            for one in samples
            for pair in one.qa_pairs
        ]
        step: Step = ReleasedStep(network, backbone)
    else:
        if device == "cuda" and not options.no_compile:
            backbone.compile()
            network.compile_layers()
        step = OurStep(TrainStep(network, backbone, StepOptions(recompute=case.recompute)))
    report: dict[str, Any] = {"before_bytes": peak_bytes(device), "seconds": [], "splits": []}
    # The weights stay, so every step is the same.
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, fused=device == "cuda")
    run = Run(step, samples, optimizer, device)
    for word in map(str.strip, sys.stdin):
        if word == "prepare":
            # The first step compiles, and settles the size of micro-batches.
            report["loss"], gradients = run.gradients(network)
            # The writer of safetensors copies, which would count in the peak memory.
            torch.save(gradients, options.gradients)
            del gradients
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
        elif word == "step":
            report["seconds"].append(run.timed())
            report["peak_bytes"] = peak_bytes(device)
        elif word == "split":
            report["splits"].append(run.split())
        else:
            decoding = decode_seconds(case, backbone)
            report["micro_batch"] = run.micro
            report["decode_seconds"] = None if decoding is None else decoding * len(samples)
        print(json.dumps(report), flush=True)
        if word == "report":
            return


class OurStep:
    """TrainStep, reported stage by stage."""

    def __init__(self, step: TrainStep) -> None:
        self.step = step

    def __call__(self, samples: list[Sample], total: int, stage: Stage) -> Tensor:
        step, group = self.step, self.step.hypernet.group
        contexts = [chunk for one in samples for chunk in one.chunks]
        features = visual_features(step.backbone, contexts)
        stage("vision")

        def watched(*arguments: Any) -> Any:
            stage("text encode")
            factors = group(*arguments)
            stage("hypernetwork forward")
            return factors

        with mock.patch.object(step.hypernet, "group", watched):
            adapters = step.adapters(samples, features)
        stage("hypernetwork forward")
        leaves = [replace(a, A=_leaves(a.A), B=_leaves(a.B)) for a in adapters]
        loss = step.loss(samples, features, leaves, total).loss
        stage("answer forward")
        loss.backward()
        stage("answer backward")
        factors, copies = (
            [factor for a in each for side in (a.A, a.B) for factor in side.values()]
            for each in (adapters, leaves)
        )
        torch.autograd.backward(factors, [leaf.grad for leaf in copies])
        stage("hypernetwork backward")
        return loss.detach()


def _leaves(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {m: t.detach().requires_grad_() for m, t in factors.items()}


class Run:
    """Whole steps over one batch, in micro-batches that fit."""

    def __init__(
        self, step: Step, samples: list[Sample], optimizer: torch.optim.Optimizer, device: str
    ) -> None:
        self.step, self.samples, self.optimizer, self.device = step, samples, optimizer, device
        self.micro = len(samples)

    def once(self, stage: Stage = lambda name: None, update: bool = True) -> float:
        """The loss. Halves the micro-batch until the step fits into memory."""
        total = sum(len(one.qa_pairs) for one in self.samples)
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                losses = [
                    self.step(self.samples[start : start + self.micro], total, stage)
                    for start in range(0, len(self.samples), self.micro)
                ]
                break
            except torch.OutOfMemoryError:
                if self.micro == 1:
                    raise
            self.micro = (self.micro + 1) // 2
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        if update:
            self.optimizer.step()
        stage("optimizer")
        return sum(losses).item()

    def timed(self) -> float:
        """Seconds of a step."""
        start = self._now()
        self.once()
        return self._now() - start

    def split(self) -> dict[str, float]:
        """Seconds of each stage of a step that waits for the device after every stage."""
        spent = dict.fromkeys(STAGES, 0.0)
        last = self._now()

        def stage(name: str) -> None:
            nonlocal last
            now = self._now()
            spent[name] += now - last
            last = now

        self.once(stage)
        return spent

    def gradients(self, network: HyperNetwork) -> tuple[float, dict[str, Tensor]]:
        """The loss, and the gradient of every parameter, on the CPU."""
        loss = self.once(update=False)
        return loss, {name: p.grad.cpu() for name, p in network.named_parameters()}

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        elif torch.get_num_threads() == 1:
            # Other load on the machine does not count.
            return time.process_time()
        return time.perf_counter()


def models(case: Case, device: str) -> tuple[HyperNetwork, SmolVLM]:
    """Random weights; the hypernetwork in float32."""
    # A tenth of the adapters of a trained network. Random adapters of full size saturate the frozen
    # model, whose gradients then depend on the last bit.
    network = random_hypernet(case.shape, scale=1e-3, **case.hypernet).to(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return network, random_backbone(case.shape, device, dtype)


def batch(case: Case, backbone: SmolVLM) -> list[Sample]:
    """Videos of random pixels, questions and answers of random ids."""
    generator = torch.Generator().manual_seed(0)

    def text(count: int) -> list[int]:
        return random_ids(backbone, count, generator).tolist()

    side = backbone.tile_size
    samples = []
    for index in range(case.videos):
        size = (case.frames, 3, side, side)
        pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        chunk = Context(random_context(backbone, case.frames, generator), pixels)
        lengths = torch.randint(*ANSWER_TOKENS, (case.prompts,), generator=generator).tolist()
        turns = tuple((text(QUESTION_TOKENS), text(length)) for length in lengths)
        kinds = ("qa",) * case.prompts
        samples.append(Sample(f"video {index}", (chunk,), text(5), turns, kinds, case.frames))
    return samples


def decode_seconds(case: Case, backbone: SmolVLM) -> float | None:
    """CPU seconds to read frames of an H.264 file of 8 s and resize them; None without PyAV."""
    if importlib.util.find_spec("av") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = write_clip(Path(folder) / "clip.mp4", "h264", 8 * FPS, 384)
        start = time.process_time()
        clip = load_video(path, case.frames, exact_frames=True)
        frame_views(clip.frames, case.shape.longest_edge, backbone.tile_size)
        return time.process_time() - start


if __name__ == "__main__":
    sys.exit(main())
