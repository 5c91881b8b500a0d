"""The training loop: one for CPU and GPUs, one process and many, every data source.

Loads or resumes, then steps, logs, validates (:class:`Validation`), saves and stops. Everything a
step depends on is a function of (settings, step), so a resumed run gives the same numbers to the
last bit, and a run on another number of processes the same up to the rounding of sums.

Nothing waits for the device in a step that is not logged, validated or saved.
"""

from __future__ import annotations

import math
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from v2l_fast.console import log
from v2l_fast.data.readers import Failure, Sample, Source
from v2l_fast.errors import CheckpointError, ConfigError, V2LError
from v2l_fast.files import read_json, write_json
from v2l_fast.generation import SamplingParams, answer_prompts
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.hypernet.config import HypernetConfig
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.loading import load_hypernet, training_sampling
from v2l_fast.pipeline import visual_features
from v2l_fast.training.checkpoint import (
    RunFolder,
    checkpoint_path,
    load_checkpoint,
    named_parameters,
    read_progress,
    refuse_other_settings,
    rotate_checkpoints,
    save_checkpoint,
)
from v2l_fast.training.config import FROM_DATA, TrainConfig, flatten
from v2l_fast.training.distributed import Distributed, Stopped, StopSignals
from v2l_fast.training.loader import (
    EpochOrder,
    Key,
    Quarantine,
    StepBatch,
    check_shared_memory,
    read_batches,
    step_batches,
)
from v2l_fast.training.logging import (
    Meter,
    RunReport,
    Speed,
    StepCost,
    Sums,
    added,
    environment,
    means,
    memory_gb,
    peak_flops,
)
from v2l_fast.training.sources import (
    Sources,
    base_model,
    decide_features,
    open_sources,
    store_features,
)
from v2l_fast.training.step import (
    StepOptions,
    StepResult,
    TrainStep,
    make_optimizer,
    rate_factor,
    set_rate,
)
from v2l_fast.vlm import Backbone, load_backbone

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULT_MODULES = ("down_proj",)


class TrainingError(V2LError):
    """A run cannot go on."""


def train(
    config: TrainConfig,
    resume: bool | None = None,
    backbone: Backbone | None = None,
    sources: Sources | None = None,
    console: Console | None = None,
    *,
    find_base: Callable[[TrainConfig], str | Path] = base_model,
    find_sources: Callable[[TrainConfig, Backbone], Sources] = open_sources,
) -> dict[str, Any]:
    """Train a hypernetwork and return the run's summary, which `summary.json` keeps.

    Args:
        resume: True continues from the last checkpoint of `run.folder` and fails without one,
            False starts over, None continues where there is one.
        backbone, sources: the frozen model, and the videos to train and to validate on, if they
            are loaded already.
        console: where progress is shown; standard error if omitted.
        find_base, find_sources: where the frozen model lies, and its videos, if they are not given;
            called on the main process first.

    Raises:
        ConfigError: settings that cannot work together.
        CheckpointError: the folder's checkpoint is broken or has other settings, or another run
            writes there.
        TrainingError: the loss is not finite.
        Stopped: a signal ended the run, after a checkpoint.
    """
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    init = Path(config.model.init or "-")
    if init.exists() and init.resolve().is_relative_to(Path(config.run.folder).resolve()):
        raise ConfigError(
            f"model.init={config.model.init} lies in run.folder, which the run writes; name "
            "another run.folder"
        )
    distributed, folder = Distributed(config), RunFolder(config.run.folder)
    try:
        accumulation = config.optim.accumulation(distributed.count)
        distributed.on_main_process(lambda: folder.open(resume))
        folder.refuse_another(distributed.gather)
        with distributed.main_first():
            if backbone is None:
                device = distributed.device
                backbone = load_backbone(find_base(config), device, _dtype(config, device))
            initial = load_hypernet(config.model.init)[0] if config.model.init else None
            config = config.with_sampling(
                training_sampling(backbone.name_or_path)
                if initial is None
                else initial.config.sampling
            )
            sources = sources or find_sources(config, backbone)
        hypernet = make_hypernet(config, backbone, initial)
        run = _Run(config, distributed, folder, backbone, sources, hypernet, console)
        return run.train(accumulation, console)
    finally:
        folder.close()
        distributed.close()


# --- the network ----------------------------------------------------------------------------------


def hypernet_config(config: TrainConfig, backbone: Backbone) -> HypernetConfig:
    """The architecture: sizes from the base, sampling from `data`, the rest from `model.hypernet`.

    Raises:
        ConfigError: a value is out of range.
    """
    chosen = dict(config.model.hypernet)
    names = chosen.pop("target_modules", DEFAULT_MODULES)
    linears = {name: backbone.linear(0, name) for name in names}
    return HypernetConfig(
        hidden_size=backbone.hidden_size,
        num_layers=backbone.decoder.num_layers,
        target_modules={n: (x.in_features, x.out_features) for n, x in linears.items()},
        base_model_name_or_path=config.model.base or config.data.source,
        **{name: getattr(config.data, name) for name in FROM_DATA},
        **chosen,
    )


def make_hypernet(
    config: TrainConfig, backbone: Backbone, initial: HyperNetwork | None = None
) -> HyperNetwork:
    """A fresh network, or `initial` (that of `model.init`) with the parts it lacks fresh.

    Raises:
        ConfigError: a part of `initial` has another shape.
    """
    architecture = hypernet_config(config, backbone)
    if initial is not None:
        inherited = {
            field.name: getattr(initial.config, field.name)
            for field in fields(HypernetConfig)
            if field.name not in ("base_model_name_or_path", *FROM_DATA, *config.model.hypernet)
        }
        architecture = replace(architecture, **inherited)
    torch.manual_seed(config.run.seed)
    network = HyperNetwork(architecture)
    if initial is None:
        return network
    state, known = network.state_dict(), initial.state_dict()
    for name, value in known.items():
        if name not in state or state[name].shape != value.shape:
            raise ConfigError(
                f"model.init={config.model.init}: its {name} does not fit model.hypernet and the "
                f"base {backbone.name_or_path}; leave out the fields that it was not trained with"
            )
    network.load_state_dict(state | known)
    return network


def export(network: HyperNetwork, folder: Path, dtype: torch.dtype) -> None:
    """Write a copy in `dtype` that `HyperNetwork.from_pretrained` and `v2l` load."""
    with torch.device("meta"):
        copy = HyperNetwork(network.config)
    copy.load_state_dict(
        {name: value.detach().to("cpu", dtype) for name, value in network.state_dict().items()},
        assign=True,
    )
    copy.save_pretrained(folder)


# --- the loop -------------------------------------------------------------------------------------


class _Run:
    """The state of one call of `train`, and its loop."""

    def __init__(
        self,
        config: TrainConfig,
        distributed: Distributed,
        folder: RunFolder,
        backbone: Backbone,
        sources: Sources,
        hypernet: HyperNetwork,
        console: Console | None,
    ) -> None:
        self.config, self.distributed, self.folder = config, distributed, folder
        self.hypernet = hypernet.to(distributed.device)
        mode = config.run.compile
        if mode == "on" or (mode == "auto" and distributed.device.type == "cuda"):
            backbone.compile()
            self.hypernet.compile_layers()
        self.step = TrainStep(self.hypernet, backbone, step_options(config))
        self.parameters = named_parameters(self.hypernet)
        self.optimizer = make_optimizer(self.hypernet, config.optim)
        self.features, reason = decide_features(config, sources, folder, distributed)
        if reason and distributed.is_main:
            (console or log).print(reason, soft_wrap=True)
        if self.features:
            sources = store_features(config, backbone, sources, distributed)
        self.source, val = sources
        self.quarantine = Quarantine(folder.quarantine, len(self.source))
        self.validation = None
        if val is not None and config.data.val_videos:
            self.validation = Validation(
                val, config, Quarantine(folder.val_quarantine, len(val)),
                distributed.rank, distributed.count,
            )  # fmt: skip
        cost = StepCost.of(backbone, self.hypernet.config)
        self.speed = Speed(cost, peak_flops(distributed.device), distributed.count)
        self.meter = Meter(counts=distributed.is_main)
        self.start, self.seconds, self.began = 0, 0.0, time.perf_counter()
        self.run_id = uuid.uuid4().hex
        self.last: dict[str, float] = {}
        self.val: dict[str, float] = {}

    def train(self, accumulation: int, console: Console | None) -> dict[str, Any]:
        """From the last checkpoint, or the start, to the last step."""
        self._restore()
        config, run, distributed = self.config, self.config.run, self.distributed
        if self.start == config.optim.steps:
            if distributed.is_main:
                console = console or log
                console.print(
                    f"{self.folder.path}: this run is complete ({self.start} steps); name another "
                    "run.folder, or start over with --fresh",
                    soft_wrap=True,
                )
            return self._summary()
        if not getattr(self.source, "on_gpu", False):
            share = -(-config.optim.batch_size // distributed.count)
            micro_batch = -(-share // accumulation)
            check_shared_memory(config.data, micro_batch, getattr(self.source, "video_bytes", 0))
        model = distributed.wrap(self.step)
        distributed.start_trackers(config, self.start, self.run_id)
        report = RunReport(
            self.folder,
            config.optim.steps,
            self.start,
            distributed.track,
            distributed.is_main,
            console,
        )
        batches = step_batches(
            self.source,
            EpochOrder(len(self.source), config.optim.batch_size, run.seed),
            range(self.start, config.optim.steps),
            config.data,
            self.quarantine,
            rank=distributed.rank,
            processes=distributed.count,
            accumulation=accumulation,
            pinned=distributed.device.type == "cuda",
        )
        with StopSignals() as signals, report:
            report.say(self._opening(accumulation))
            for batch in batches:
                examples = sum(len(sample.qa_pairs) for sample in batch.samples)
                # This also tells every process that one of them must stop.
                total, stops = distributed.all_reduce_sum([examples, float(signals.received > 0)])
                self._optimize(model, batch, int(total))
                self.quarantine.refresh()
                step = batch.step + 1
                last = step == config.optim.steps
                report.advance(step)
                if last or step % run.log_every == 0:
                    self._log(step, report)
                if last or _due(step, run.val_every):
                    self._validate(step, report)
                if _due(step, run.sample_every):
                    self._answer(step, report)
                if last or stops or _due(step, run.checkpoint_every):
                    self._save(step)
                if stops and not last:
                    report.say(
                        f"stopped after step {step} of {config.optim.steps}, saved in "
                        f"{self.folder.checkpoints}; the same command continues"
                    )
                    raise Stopped(signals.received or signal.SIGTERM, step)
            summary = self._summary()
            report.say(f"done: {self.folder.hypernet}, {self.folder.summary}")
            return summary

    # --- parts of a step --------------------------------------------------------------------------

    def _optimize(self, model: nn.Module, batch: StepBatch, examples: int) -> None:
        """Forward, backward and update of one step; nothing here waits for the device."""
        config = self.config.optim
        # Random numbers depend on the step alone, so a checkpoint needs no generator's state.
        torch.manual_seed(self.config.run.seed * 1_000_003 + batch.step)
        set_rate(self.optimizer, config, batch.step)
        results = []
        for number, samples in enumerate(batch.micro_batches, 1):
            with self.distributed.no_sync(model, number < len(batch.micro_batches)):
                result = model(samples, example_total=max(examples, 1))
                self.distributed.backward(result.loss)
            results.append(StepResult(result.loss.detach(), result.parts))
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), config.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.meter.add(results, norm)
        self.speed.add(batch)

    def _merge(self, step: int) -> None:
        self.meter.merge(self.distributed.gather)
        age = self.meter.first_bad_step()
        if age is not None:
            raise TrainingError(
                f"{self.folder.path}: loss or gradient is not finite in step {step - age}; the "
                "last checkpoint is from before, lower optim.lr or look at the data of that step"
            )

    def _log(self, step: int, report: RunReport) -> None:
        self._merge(step)
        self.last = self.meter.means()
        numbers: dict[str, float | None] = {
            **self.last,
            "lr": self.config.optim.lr * rate_factor(self.config.optim, step - 1),
            **self.speed.take(self.distributed.all_reduce_sum),
            "memory_gb": memory_gb(self.distributed.device),
            "seconds": round(self._elapsed(), 1),
        }
        report.log(step, numbers)

    def _validate(self, step: int, report: RunReport) -> None:
        if self.validation is not None:
            with self.speed.paused():
                self.val = self.validation.loss(self.step, self.distributed.gather)
                report.validation(step, self.val)
                if self.distributed.is_main:
                    self._keep_best(step)

    def _answer(self, step: int, report: RunReport) -> None:
        if self.validation is not None and self.distributed.is_main:
            with self.speed.paused():
                report.samples(step, self.validation.answers(self.step, self.config.run.samples))

    # --- checkpoints ------------------------------------------------------------------------------

    def _best(self) -> dict[str, Any] | None:
        """Step and validation numbers of the best network so far, also that of a killed run."""
        path = self.folder.best_record
        return (
            read_json(path, error=CheckpointError, kind=dict, allow_nan=True)
            if path.is_file()
            else None
        )

    def _keep_best(self, step: int) -> None:
        """Export the network if its validation cross-entropy is the lowest so far."""
        best, val_ce = self._best(), self.val.get("val_ce", math.nan)
        if val_ce < (math.inf if best is None else best["val_ce"]):
            export(self.hypernet, self.folder.best, DTYPES[self.config.run.export_dtype])
            # Written after the weights: a run killed in between writes both again.
            write_json(self.folder.best_record, {"step": step, **self.val})

    def _restore(self) -> None:
        """Continue from the latest checkpoint, if there is one."""
        latest = self.folder.latest()
        if latest is None:
            return
        progress = read_progress(latest)
        refuse_other_settings(latest, progress["settings"], self._settings())
        load_checkpoint(latest, self.parameters, self.optimizer)
        self.start, self.seconds = progress["step"], progress["seconds"]
        self.last, self.val = progress["last"], progress["val"]
        self.meter.restore(progress["meter"])
        self.run_id = progress.get("run_id", self.run_id)
        self.quarantine.refresh()

    def _save(self, step: int) -> None:
        """Write a checkpoint and its loadable export, on the main process."""
        self._merge(step)
        if not self.distributed.is_main:
            return
        progress = {
            "step": step,
            "seconds": self._elapsed(),
            "last": self.last,
            "val": self.val,
            "meter": self.meter.state(),
            "features": self.features,
            "run_id": self.run_id,
            "settings": self._settings(),
        }
        folder, run = self.folder, self.config.run
        path = checkpoint_path(folder.checkpoints, step)
        save_checkpoint(path, self.parameters, self.optimizer, progress)
        rotate_checkpoints(folder.checkpoints, run.keep)
        export(self.hypernet, folder.hypernet, DTYPES[run.export_dtype])

    def _settings(self) -> dict[str, Any]:
        """The settings that a checkpoint must have been written with."""
        network = flatten(self.hypernet.config.to_dict(), "hypernetwork.")
        return {**self.config.fingerprint(), **network, "videos in the source": len(self.source)}

    # --- messages and the summary -----------------------------------------------------------------

    def _opening(self, accumulation: int) -> str:
        optim, count = self.config.optim, sum(p.numel() for p in self.parameters.values())
        start = f"continuing after step {self.start}" if self.start else "starting"
        where = environment(self.distributed.device, self.distributed.count)["device"]
        return (
            f"{start} in {self.folder.path}: {count:,} parameters, {len(self.source)} videos, "
            f"{optim.steps} steps of {optim.batch_size} videos (processes: "
            f"{self.distributed.count}, micro-batches per process: {accumulation}), {where}"
        )

    def _summary(self) -> dict[str, Any]:
        """The run's settings and results, written once when it is complete."""
        path = self.folder.summary
        if path.is_file():
            return read_json(path, error=CheckpointError, kind=dict, allow_nan=True)
        summary = {
            "what": f"hypernetwork trained on {self.config.data.source}",
            "config": asdict(self.config),
            "hypernetwork": self.hypernet.config.to_dict(),
            "parameters": sum(p.numel() for p in self.parameters.values()),
            "videos": len(self.source),
            "steps": self.config.optim.steps,
            "seconds": round(self._elapsed(), 1),
            "last": self.last,
            "validation": self.val,
            "best": self._best(),
            "quarantined": len(self.quarantine),
            "environment": environment(self.distributed.device, self.distributed.count),
        }
        if self.distributed.is_main:
            write_json(path, summary)
        return summary

    def _elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self.began


def step_options(config: TrainConfig) -> StepOptions:
    """The settings of the step."""
    loss = config.loss
    return StepOptions(
        recompute=config.model.recompute,
        kind_weights=loss.kind_weights,
        kl_weight=loss.kl_weight,
        kl_temperature=loss.kl_temperature,
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    if config.model.dtype != "auto":
        return DTYPES[config.model.dtype]
    return torch.bfloat16 if device.type == "cuda" else torch.float32


# --- validation -----------------------------------------------------------------------------------

# Of a generated answer.
MAX_NEW_TOKENS = 96


class Validation:
    """Passes over one source, with the same videos and questions every time.

    Args:
        source: the videos, of which the first `data.val_videos` are used.
        config: of the run.
        quarantine: list of the source's broken videos.
        rank, processes: this process takes every `processes`-th video.
    """

    def __init__(
        self,
        source: Source,
        config: TrainConfig,
        quarantine: Quarantine,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.source, self.config, self.quarantine = source, config, quarantine
        count = min(len(source), config.data.val_videos)
        self.indices = range(rank, count, processes)

    @torch.no_grad()
    def loss(self, step: TrainStep, gather: Callable[[Sums], list[Sums]]) -> dict[str, float]:
        """Means over examples: `val_loss`, `val_TYPE` of each task type, and `val_ce`.

        The latter is the cross-entropy with every answer weighted equally; the best network is the
        one with the lowest.
        """
        sums: Sums = {}
        for samples in self._batches():
            if samples:
                result = step(samples, example_total=1)
                examples = sum(len(sample.qa_pairs) for sample in samples)
                parts = {name: pair.tolist() for name, pair in result.parts.items()}
                parts["loss"] = [result.loss.item(), float(examples)]
                sums = added([sums, parts])
        merged = added(gather(sums))
        values = means(merged)
        answers = [pair for name, pair in merged.items() if name not in ("loss", "kl")]
        if count := sum(number for _, number in answers):
            values["ce"] = sum(total for total, _ in answers) / count
        return {f"val_{name}": value for name, value in values.items()}

    @torch.no_grad()
    def answers(self, step: TrainStep, count: int) -> list[dict[str, Any]]:
        """Greedy answers to one question of each of the first `count` videos."""
        samples: list[Sample] = []
        for index in self.indices[:count]:
            sample = self.source.load(index, 0)
            if not isinstance(sample, Failure):
                samples.append(sample)
        if not samples:
            return []
        backbone = step.backbone
        contexts = [chunk for sample in samples for chunk in sample.chunks]
        layers = step.adapters(samples, visual_features(backbone, contexts))
        factors = [(layer.A, layer.B) for layer in layers]
        scale = layers[0].scale
        adapters = [Adapter.of_layers(factors, row, scale) for row in range(len(samples))]
        # A different question of each video, so that every task type appears.
        pairs = [s.qa_pairs[i % len(s.qa_pairs)] for i, s in enumerate(samples)]
        prompts = [
            partial(backbone.prompt, sample.prompt_prefix + question)
            for sample, (question, _) in zip(samples, pairs, strict=True)
        ]
        params = SamplingParams(max_new_tokens=MAX_NEW_TOKENS)
        answers = answer_prompts(backbone, prompts, adapters, params)
        return [
            {
                "video": sample.video,
                "question": " ".join(backbone.decode(sample.prompt_prefix + question).split()),
                "answer": answer.text,
                "reference": backbone.decode(reference),
            }
            for sample, (question, reference), answer in zip(samples, pairs, answers, strict=True)
        ]

    def _batches(self) -> Iterator[Sequence[Sample]]:
        size = self.config.optim.micro_batch_size
        keys: list[list[Key]] = [
            [(0, index) for index in self.indices[start : start + size]]
            for start in range(0, len(self.indices), size)
        ]
        return read_batches(self.source, keys, self.config.data, self.quarantine)
