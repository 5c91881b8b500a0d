"""Training of the tiny VLM: vision tower, cached visual tokens, decoder, folder, record.

Responsible for the order of the stages, for resuming (each stage writes a file in the run's folder
and is skipped if the file exists), and for both stages: tower and connector learn single frames;
then the decoder learns captions and questions about scenes on cached visual tokens.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
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
from v2l_fast.training.checkpoint import (
    load_checkpoint,
    named_parameters,
    read_progress,
    refuse_other_settings,
    save_checkpoint,
)
from v2l_fast.training.step import PackedPairs, pack_pairs

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
        trained = train_decoder(
            model, prompts, scenes, visual, settings, str(seed), lambda _: prompts.video_prefix,
            partial(video_qa_pairs, questions=settings.questions),
            folder / "language.safetensors", _steps(bar, total),
        )  # fmt: skip
    seconds["language"] = trained["seconds"]

    save_base(model, tokenizer, folder / "base")
    scenes = sample_scenes("val", _VAL_VIDEOS, seed)
    validation = evaluate_direct(load_base(folder / "base"), scenes)
    result = {
        "what": "tiny SmolVLM of the shapes world",
        "seed": seed,
        "vision": {"schedule": [asdict(stage) for stage in SCHEDULE], "probes": probes},
        "language": {**asdict(settings), "steps": trained["step"]},
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


def vision_parameters(model: SmolVLMForConditionalGeneration) -> dict[str, Tensor]:
    """Those of the vision tower and the connector, by name."""
    return {
        name: value
        for name, value in model.state_dict().items()
        if ".vision_model." in name or ".connector." in name
    }


def _vision_stage(
    model: SmolVLMForConditionalGeneration, path: Path, seed: int
) -> dict[str, float]:
    """Pre-train tower and connector, or load them; return the heads' last scores and seconds."""
    parts = vision_parameters(model)
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
class DecoderSettings:
    """What both stages of the decoder's training set; learning rates are linear in the step.

    Attributes:
        videos: number of training videos.
        batch: videos of a step.
        no_video_share: share of the videos that are not shown with their questions.
        lr, final_lr: learning rate after `warmup` steps, and after the last `decay` steps.
        caption_weight: share of the mean loss of captions and detailed descriptions; the other
            answers have the rest.
        checkpoint_every: steps between two checkpoints.
    """

    videos: int
    batch: int
    no_video_share: float
    lr: float
    final_lr: float
    warmup: int
    weight_decay: float
    decay: int
    caption_weight: float
    checkpoint_every: int

    def decay_from(self, step: int, running: Mapping[str, float]) -> int | None:
        """The step from which the learning rate decays, if `step` steps with these running scores
        have decided it."""
        raise NotImplementedError

    def rate(self, step: int, decay_from: int | None) -> float:
        """The learning rate of 0-based `step`; `decay_from` is None as long as it is open."""
        raise NotImplementedError


@dataclass(frozen=True)
class LanguageSettings(DecoderSettings):
    """The first stage of the decoder.

    The learning rate decays once motion questions reach `motion_goal` (a running mean over training
    batches), not before `min_flat` and not after `max_flat` steps.
    """

    videos: int = 16384
    batch: int = 32
    no_video_share: float = 0.12
    lr: float = 2e-3
    final_lr: float = 5e-5
    warmup: int = 100
    weight_decay: float = 0.05
    decay: int = 1000
    caption_weight: float = 0.5
    checkpoint_every: int = 200
    questions: int = 3
    motion_goal: float = 0.9
    min_flat: int = 1500
    max_flat: int = 3500

    def decay_from(self, step: int, running: Mapping[str, float]) -> int | None:
        reached = step >= self.min_flat and running.get("motion", 0) >= self.motion_goal
        return step if reached or step >= self.max_flat else None

    def rate(self, step: int, decay_from: int | None) -> float:
        rate = self.lr * min(1.0, (step + 1) / self.warmup)
        if decay_from is None:
            return rate
        remaining = max(0.0, 1 - (step - decay_from) / self.decay)
        return self.final_lr + (rate - self.final_lr) * remaining


def video_qa_pairs(scene: Scene, rng: random.Random, questions: int) -> list[QAPair]:
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


def train_decoder(
    model: SmolVLMForConditionalGeneration,
    prompts: Prompts,
    scenes: Sequence[Scene],
    visual: Sequence[Tensor] | Tensor,
    settings: DecoderSettings,
    stage: str,
    video_prefix: Callable[[int], list[int]],
    qa_pairs: Callable[[Scene, random.Random], list[QAPair]],
    checkpoint: Path,
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Train the decoder in place, resuming from `checkpoint` if it exists.

    Args:
        scenes, visual: the training videos and the visual tokens [F, T, D] of each.
        stage: name and seed, which with the step determine every random choice.
        video_prefix: token ids before the questions of a video by its number.
        qa_pairs: draws the questions about a scene.

    Returns:
        "step": number of steps; "seconds" of them, including those before a resume; "running":
        means of the loss and, by kind, of the share of correct answers.

    Raises:
        CheckpointError: the checkpoint is broken, or of other settings.
    """
    freeze(model.model.vision_model)
    freeze(model.model.connector)
    parameters = named_parameters(model)
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    identity = {"stage": stage, **asdict(settings)}
    progress: dict[str, Any] = {
        "step": 0, "decay_from": settings.decay_from(0, {}), "running": {}, "seconds": 0.0,
        "settings": identity,
    }  # fmt: skip
    if checkpoint.exists():
        saved = read_progress(checkpoint).get("settings", {})
        refuse_other_settings(checkpoint, saved, identity)
        progress = load_checkpoint(checkpoint, parameters, optimizer)
    running = progress["running"]
    started = time.perf_counter() - progress["seconds"]
    model.train()
    while (start := progress["decay_from"]) is None or progress["step"] < start + settings.decay:
        step = progress["step"]
        rng = random.Random(f"{stage}/{step}")
        picks = rng.sample(range(len(scenes)), settings.batch)
        with_video = [rng.random() >= settings.no_video_share for _ in picks]
        pairs = [qa_pairs(scenes[i], rng) for i in picks]
        packed = pack_pairs(
            [
                video_prefix(i) if see else prompts.text_prefix
                for i, see in zip(picks, with_video, strict=True)
            ],
            [
                [(prompts.question(p.question), prompts.answer(p.answer)) for p in row]
                for row in pairs
            ],
            prompts.tokenizer.pad_token_id,
        )
        tokens = [visual[i].flatten(0, 1) for i, see in zip(picks, with_video, strict=True) if see]
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step, start)
        _language_step(
            model, optimizer, packed, torch.cat(tokens).float(), pairs, with_video,
            settings.caption_weight, running,
        )  # fmt: skip
        progress["step"] += 1
        if start is None:
            progress["decay_from"] = settings.decay_from(step + 1, running)
        progress["seconds"] = time.perf_counter() - started
        if report is not None:
            report(step + 1, running)
        if (step + 1) % settings.checkpoint_every == 0:
            save_checkpoint(checkpoint, parameters, optimizer, progress)
    model.eval()
    return progress


def _language_step(
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
        running: means of the loss and, by kind, of the share of correct answers; updated.
    """
    logits = answer_logits(model, packed, visual)
    losses = F.cross_entropy(logits, packed.targets, reduction="none")
    kinds = [pair.kind for row in pairs for pair in row]
    is_caption = torch.tensor([kind in ("caption", "details") for kind in kinds])
    is_caption = is_caption[packed.pair_index]
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
