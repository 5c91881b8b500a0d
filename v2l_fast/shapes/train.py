"""Training of the tiny VLM: vision tower, cached visual tokens, decoder, folder, record.

Responsible for the order of the stages, for resuming (each stage writes a file in the run's folder
and is skipped if the file exists), and for both stages: tower and connector learn single frames;
then the decoder learns captions and questions about scenes on cached visual tokens.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SmolVLMForConditionalGeneration

from v2l_fast.console import Report, note, progress_bar
from v2l_fast.errors import CheckpointError
from v2l_fast.files import write_json
from v2l_fast.shapes.evaluate import evaluate_direct
from v2l_fast.shapes.language import PLACE_KINDS, QAPair, ask, ask_several
from v2l_fast.shapes.render import augment, draw_frames
from v2l_fast.shapes.vlm import (
    IMAGE_SIZE,
    TOKENS_PER_FRAME,
    Prompts,
    cache_visual_tokens,
    freeze,
    load_base,
    new_base,
    pixel_values,
    save_base,
    visual_tokens,
)
from v2l_fast.shapes.world import BACKGROUNDS, COLORS, SHAPES, SIZES, Scene, sample_scenes
from v2l_fast.tensor_files import load_tensors, save_tensors
from v2l_fast.training.batches import PackedPairs, pack_pairs
from v2l_fast.training.checkpoint import (
    load_checkpoint,
    named_parameters,
    read_progress,
    refuse_other_settings,
    save_checkpoint,
)

_VAL_VIDEOS = 512


def train_vlm(
    folder: Path,
    record: Path,
    seed: int = 0,
    settings: LanguageSettings | None = None,
    threads: int = 1,
) -> dict[str, Any]:
    """Train the tiny VLM; write it to folder/base and the record of the run to `record`."""
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
    """Pre-train tower and connector, or load them; return the heads' last scores and seconds."""
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
    """A callback that shows steps and running scores on a progress bar."""

    def report(step: int, scores: dict[str, float]) -> None:
        names = ("loss", "motion", "caption", "shape")
        texts = (f"{name} {scores[name]:.3f}" for name in scores if name in names)
        bar(" ".join(["step,", *texts]), step, total)

    return report


# --- vision ---------------------------------------------------------------------------------------

# Tower and connector learn single frames before any language. Temporary linear heads predict
# background, size, color, shape and the object's center from a frame's tokens. The schedule matters
# more than the final scores of the heads: first heads on the concatenated tokens (which keeps
# positions linearly decodable), then on their mean, then again on the concatenation with a large
# weight on the center. With towers trained on mean heads only, the decoder never learned motion.
_CLASSES = {
    "background": len(BACKGROUNDS),
    "size": len(SIZES),
    "color": len(COLORS),
    "shape": len(SHAPES),
}


@dataclass(frozen=True)
class VisionStage:
    """One part of the schedule; `reads` is the heads' input, "concat" or "mean" of the tokens."""

    steps: int
    reads: str
    lr: float
    center_weight: float


SCHEDULE = (
    VisionStage(800, "concat", 2e-3, 4.0),
    VisionStage(300, "mean", 1.5e-3, 4.0),
    VisionStage(600, "concat", 1.5e-3, 30.0),
)


def random_frames(batch: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Augmented frames [batch, 3, H, W] in 0..255 with an object anywhere, and their labels."""

    def choose(count: int) -> Tensor:
        return torch.randint(count, (batch,), generator=generator)

    labels = {name: choose(count) for name, count in _CLASSES.items()}
    center = torch.rand(batch, 2, generator=generator) * 0.84 + 0.08
    jitter = torch.rand(batch, generator=generator) * 0.16 + 0.92
    radius = torch.tensor(tuple(SIZES.values()))[labels["size"]] * jitter
    frames = draw_frames(
        labels["background"], labels["color"], labels["shape"], radius, center, IMAGE_SIZE
    )
    labels["center"] = center
    return augment(frames, generator), labels


class Heads(nn.Module):
    """Linear classifiers of a frame's tokens, for pre-training only."""

    def __init__(self, width: int, reads: str) -> None:
        super().__init__()
        self.reads = reads
        inputs = width * TOKENS_PER_FRAME if reads == "concat" else width
        self.norm = nn.LayerNorm(inputs)
        self.classes = nn.ModuleDict({k: nn.Linear(inputs, n) for k, n in _CLASSES.items()})
        self.center = nn.Linear(inputs, 2)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """tokens [N, T, D] -> logits [N, classes] by attribute, and "center" [N, 2]."""
        x = self.norm(tokens.flatten(1) if self.reads == "concat" else tokens.mean(1))
        logits = {name: head(x) for name, head in self.classes.items()}
        return logits | {"center": self.center(x)}


def pretrain_vision(
    model: SmolVLMForConditionalGeneration,
    seed: int,
    batch: int = 256,
    schedule: tuple[VisionStage, ...] = SCHEDULE,
    report: Callable[[int, dict[str, float]], None] | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 200,
) -> dict[str, float]:
    """Train tower and connector in place.

    Args:
        report: called with the number of steps and the last scores.
        checkpoint: a file written every `checkpoint_every` steps, from which an interrupted call
            resumes bit-exactly.

    Returns:
        The last scores (accuracies, center mse), and "seconds".

    Raises:
        CheckpointError: the checkpoint is broken or of another seed or schedule.
    """
    started = time.perf_counter()
    settings = {"seed": seed, "batch": batch, "schedule": [asdict(stage) for stage in schedule]}
    generator = torch.Generator().manual_seed(seed)
    width = model.config.text_config.hidden_size
    tower = [*model.model.vision_model.parameters(), *model.model.connector.parameters()]
    torch.manual_seed(seed)
    readers: dict[str, Heads] = {}
    scores: dict[str, float] = {}
    step, resumed = 0, {}
    if checkpoint is not None and checkpoint.exists():
        resumed = read_progress(checkpoint)
        refuse_other_settings(checkpoint, resumed["settings"], settings)
    for index, stage in enumerate(schedule):
        # Created in the order of the stages, finished ones included: they share one generator.
        heads = readers.setdefault(stage.reads, Heads(width, stage.reads))
        first = 0
        if resumed:
            if step + stage.steps <= resumed["step"]:
                step += stage.steps
                continue
            first = resumed["step"] - step
        params = [*tower, *heads.parameters()]
        optimizer = torch.optim.AdamW(params, lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.01)
        if resumed:
            saved = {
                **_parameters(model, readers),
                "generator": torch.empty_like(generator.get_state()),
            }
            load_checkpoint(checkpoint, saved, optimizer)
            generator.set_state(saved["generator"])
            step, scores = resumed["step"], resumed["scores"]
            started -= resumed["seconds"]
            resumed = {}
        last = index == len(schedule) - 1
        for k in range(first, stage.steps):
            warm = min(1.0, (k + 1) / 50)
            fade = 0.5 * (1 + math.cos(math.pi * k / stage.steps)) if last else 1.0
            for group in optimizer.param_groups:
                group["lr"] = stage.lr * warm * max(fade, 0.02)
            frames, labels = random_frames(batch, generator)
            predicted = heads(visual_tokens(model, pixel_values(frames)))
            loss = stage.center_weight * F.mse_loss(predicted["center"], labels["center"])
            for name in _CLASSES:
                loss = loss + F.cross_entropy(predicted[name], labels[name])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            step += 1
            if step % 50 == 0 or (last and k == stage.steps - 1):
                with torch.no_grad():
                    scores = {
                        name: (predicted[name].argmax(-1) == labels[name]).float().mean().item()
                        for name in _CLASSES
                    }
                    scores["center_mse"] = F.mse_loss(predicted["center"], labels["center"]).item()
                    scores["loss"] = loss.item()
                if report is not None:
                    report(step, scores)
            # Not at the end of a stage, where its optimizer is no longer needed.
            if checkpoint is not None and step % checkpoint_every == 0 and k + 1 < stage.steps:
                progress = {
                    "step": step,
                    "scores": scores,
                    "seconds": time.perf_counter() - started,
                    "settings": settings,
                }
                saved = {**_parameters(model, readers), "generator": generator.get_state()}
                save_checkpoint(checkpoint, saved, optimizer, progress)
    return scores | {"seconds": time.perf_counter() - started}


def _parameters(
    model: SmolVLMForConditionalGeneration, readers: dict[str, Heads]
) -> dict[str, Tensor]:
    """The trained parameters, by name."""
    parts = {"tower": model.model.vision_model, "connector": model.model.connector, **readers}
    return {
        f"{part}.{name}": value
        for part, module in parts.items()
        for name, value in module.named_parameters()
    }


# --- language -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LanguageSettings:
    """Steps and sizes of the language stage.

    The learning rate decays once motion questions reach `motion_goal` (a running mean over training
    batches), not before `min_flat` and not after `max_flat` steps.
    """

    videos: int = 16384
    batch: int = 32
    questions: int = 3
    no_video_share: float = 0.12
    lr: float = 2e-3
    final_lr: float = 5e-5
    warmup: int = 100
    weight_decay: float = 0.05
    motion_goal: float = 0.9
    min_flat: int = 1500
    max_flat: int = 3500
    decay: int = 1000
    caption_weight: float = 0.5
    checkpoint_every: int = 200


def video_qa_pairs(scene: Scene, questions: int, rng: random.Random) -> list[QAPair]:
    """A caption, both questions about places, and `questions` others (see :func:`ask_several`)."""
    kinds = ("caption", *PLACE_KINDS)
    return [*(ask(scene, kind, rng) for kind in kinds), *ask_several(scene, questions, rng)]


def answer_logits(
    model: SmolVLMForConditionalGeneration, packed: PackedPairs, visual: Tensor
) -> Tensor:
    """Logits [N, vocabulary] at the answer positions; visual [n, D] fills the image tokens."""
    embeds = model.get_input_embeddings()(packed.ids)
    image = packed.ids == model.config.image_token_id
    embeds = embeds.masked_scatter(image[..., None], visual)
    hidden = model.model.text_model(
        inputs_embeds=embeds,
        attention_mask=packed.mask,
        position_ids=packed.positions,
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[packed.rows, packed.columns])


def learning_rate(settings: LanguageSettings, step: int, decay_from: int | None) -> float:
    """Warm-up, constant, then linear decay from step `decay_from` on (None: not yet)."""
    rate = settings.lr * min(1.0, (step + 1) / settings.warmup)
    if decay_from is None:
        return rate
    remaining = max(0.0, 1 - (step - decay_from) / settings.decay)
    return settings.final_lr + (rate - settings.final_lr) * remaining


def train_language(
    model: SmolVLMForConditionalGeneration,
    prompts: Prompts,
    scenes: Sequence[Scene],
    visual: Tensor,
    seed: int,
    settings: LanguageSettings,
    checkpoint: Path,
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> tuple[int, float]:
    """Train the decoder in place, resuming from `checkpoint` if it exists.

    Args:
        scenes, visual: the training videos and their visual tokens [B, F, T, D].

    Returns:
        The number of steps and their seconds, including those before a resume.
    """
    freeze(model.model.vision_model)
    freeze(model.model.connector)
    parameters = named_parameters(model)
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    step, decay_from, seconds = 0, None, 0.0
    running: dict[str, float] = {}
    if checkpoint.exists():
        progress = load_checkpoint(checkpoint, parameters, optimizer)
        step, decay_from, running = (progress[k] for k in ("step", "decay_from", "running"))
        seconds = progress["seconds"]
    started = time.perf_counter() - seconds
    model.train()
    pad = prompts.tokenizer.pad_token_id
    while decay_from is None or step < decay_from + settings.decay:
        rng = random.Random(f"{seed}/{step}")
        picks = rng.sample(range(len(scenes)), settings.batch)
        with_video = [rng.random() >= settings.no_video_share for _ in picks]
        pairs = [video_qa_pairs(scenes[i], settings.questions, rng) for i in picks]
        packed = pack_pairs(
            [prompts.video_prefix if see else prompts.text_prefix for see in with_video],
            [
                [(prompts.question(p.question), prompts.answer(p.answer)) for p in row]
                for row in pairs
            ],
            pad,
        )
        keep = torch.tensor([i for i, see in zip(picks, with_video, strict=True) if see])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, decay_from)
        language_step(
            model, optimizer, packed, visual[keep].flatten(0, 2), pairs, with_video,
            settings.caption_weight, running,
        )  # fmt: skip
        step += 1
        if decay_from is None and (
            step >= settings.max_flat
            or (step >= settings.min_flat and running.get("motion", 0) >= settings.motion_goal)
        ):
            decay_from = step
        if report is not None:
            report(step, running)
        if step % settings.checkpoint_every == 0:
            progress = {"step": step, "decay_from": decay_from, "running": running}
            progress["seconds"] = time.perf_counter() - started
            save_checkpoint(checkpoint, parameters, optimizer, progress)
    model.eval()
    return step, time.perf_counter() - started


def language_step(
    model: SmolVLMForConditionalGeneration,
    optimizer: torch.optim.Optimizer,
    packed: PackedPairs,
    visual: Tensor,
    pairs: Sequence[Sequence[QAPair]],
    with_video: Sequence[bool],
    caption_weight: float,
    running: dict[str, float],
) -> None:
    """One update of the decoder on packed questions and answers.

    Args:
        visual: [n, D] of the image tokens.
        pairs, with_video: of each video, its questions and whether it is shown.
        caption_weight: share of the captions' mean loss; the other answers have the rest.
        running: means of the loss and, by kind, of the share of correct answers; updated.
    """
    logits = answer_logits(model, packed, visual)
    losses = F.cross_entropy(logits, packed.targets, reduction="none")
    kinds = [pair.kind for row in pairs for pair in row]
    is_caption = torch.tensor([kind == "caption" for kind in kinds])[packed.pair_index]
    captions, others = losses[is_caption].mean(), losses[~is_caption].mean()
    loss = caption_weight * captions + (1 - caption_weight) * others
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    optimizer.step()
    shows_video = [see for see, row in zip(with_video, pairs, strict=True) for _ in row]
    _track(running, kinds, shows_video, packed, logits, loss.item())


def _track(
    running: dict[str, float],
    kinds: list[str],
    shows_video: list[bool],
    packed: PackedPairs,
    logits: Tensor,
    loss: float,
) -> None:
    """Update running means of the loss and, by kind, of the share of fully correct answers."""
    wrong = torch.zeros(len(kinds)).index_add_(
        0, packed.pair_index, (logits.detach().argmax(-1) != packed.targets).float()
    )
    right = (wrong == 0).tolist()
    rates: dict[str, list[bool]] = {}
    for kind, see, ok in zip(kinds, shows_video, right, strict=True):
        if see:
            rates.setdefault(kind, []).append(ok)
    values = {"loss": loss} | {kind: sum(oks) / len(oks) for kind, oks in rates.items()}
    for name, value in values.items():
        running[name] = value if name not in running else 0.97 * running[name] + 0.03 * value
