"""One run that makes the tiny VLM: tower, cached tokens, decoder, checkpoint folder, record.

Responsible for the order of the stages and for resuming between them: each stage leaves a file in
the run's folder and is skipped when that file exists.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import SmolVLMForConditionalGeneration

from v2l_fast.console import Report, note, progress_bar
from v2l_fast.errors import CheckpointError
from v2l_fast.files import write_json
from v2l_fast.shapes.base import load_base, new_base, save_base
from v2l_fast.shapes.evaluate import evaluate_direct
from v2l_fast.shapes.pretrain_vision import SCHEDULE, pretrain_vision
from v2l_fast.shapes.prompts import Prompts
from v2l_fast.shapes.scene import sample_scenes
from v2l_fast.shapes.train_language import LanguageSettings, cache_visual_tokens, train_language
from v2l_fast.tensor_files import load_tensors, save_tensors

_VAL_VIDEOS = 512


def train_vlm(
    folder: Path,
    record: Path,
    seed: int = 0,
    settings: LanguageSettings | None = None,
    threads: int = 1,
) -> dict[str, Any]:
    """Train the tiny VLM, write it to folder/base and the run's record to `record`."""
    settings = settings or LanguageSettings()
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = new_base(seed)
    prompts = Prompts(tokenizer)
    seconds: dict[str, float] = {}

    probes = _vision_stage(model, folder / "vision.safetensors", seed)
    seconds["vision"] = probes.pop("seconds")

    started = time.perf_counter()
    scenes = sample_scenes("train", settings.videos, seed)
    with progress_bar("base model, between the stages") as bar:
        visual = cache_visual_tokens(
            model, scenes, seed,
            report=lambda done: bar("visual tokens, video", done, len(scenes)),
        )  # fmt: skip
    seconds["cache"] = time.perf_counter() - started

    total = settings.max_flat + settings.decay
    with progress_bar("base model, stage 2 of 2") as bar:
        steps, seconds["language"] = train_language(
            model, prompts, scenes, visual, seed, settings, folder / "language.safetensors",
            _steps(bar, total),
        )  # fmt: skip

    save_base(model, tokenizer, folder / "base")
    scenes = sample_scenes("val", _VAL_VIDEOS, seed)
    validation = evaluate_direct(load_base(folder / "base"), scenes)
    result = {
        "what": "tiny SmolVLM of the shapes world",
        "seed": seed,
        "vision": {"schedule": [asdict(stage) for stage in SCHEDULE], "probes": probes},
        "language": {**asdict(settings), "steps": steps},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "threads": threads,
        "parameters": sum(p.numel() for p in model.parameters()),
        "validation": validation,
    }
    write_json(record, result)
    note(
        f"base model: captions and questions about {_VAL_VIDEOS} unseen videos are in {record}; "
        f"the model is in {folder / 'base'}"
    )
    return result


def _vision_stage(
    model: SmolVLMForConditionalGeneration, path: Path, seed: int
) -> dict[str, float]:
    """Pre-train tower and connector, or load them; returns the probes' last scores and seconds."""
    parts: dict[str, Tensor] = {
        name: value
        for name, value in model.state_dict().items()
        if ".vision_model." in name or ".connector." in name
    }
    if path.exists():
        tensors, metadata = load_tensors(path, CheckpointError)
        if tensors.keys() != parts.keys():
            raise CheckpointError(f"{path}: another model's vision tower; delete it to train again")
        model.load_state_dict(tensors, strict=False)
        return {name: float(value) for name, value in metadata.items() if name != "format"}
    checkpoint = path.with_name("vision-checkpoint.safetensors")
    with progress_bar("base model, stage 1 of 2") as bar:
        probes = pretrain_vision(
            model, seed, report=_steps(bar, sum(stage.steps for stage in SCHEDULE)),
            checkpoint=checkpoint,
        )  # fmt: skip
    save_tensors(parts, path, {name: f"{value:.6f}" for name, value in probes.items()})
    checkpoint.unlink(missing_ok=True)
    return probes


def _steps(bar: Report, total: int) -> Callable[[int, dict[str, float]], None]:
    """Steps and their running scores for a bar of `total` steps."""

    def report(step: int, scores: dict[str, float]) -> None:
        shown = {k: v for k, v in scores.items() if k in ("loss", "motion", "caption", "shape")}
        bar(" ".join(["step,", *(f"{k} {v:.3f}" for k, v in shown.items())]), step, total)

    return report
