"""Vision pre-training: tower and connector learn single frames before any language.

Temporary linear heads predict background, size, color, shape and the object's center from a frame's
tokens. The schedule matters more than the final scores of the heads: first heads on the
concatenated tokens (which keeps positions linearly decodable), then on their mean, then again on
the concatenation with a large weight on the center. With towers trained on mean heads only, the
decoder never learned motion.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SmolVLMForConditionalGeneration

from v2l_fast.shapes.render import augment, draw_frames
from v2l_fast.shapes.vlm import IMAGE_SIZE, TOKENS_PER_FRAME, pixel_values, visual_tokens
from v2l_fast.shapes.world import BACKGROUNDS, COLORS, SHAPES, SIZES
from v2l_fast.training.checkpoint import (
    load_checkpoint,
    read_progress,
    refuse_other_settings,
    save_checkpoint,
)

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
