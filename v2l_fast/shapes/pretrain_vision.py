"""Vision pre-training: the tower and connector learn single frames before any language.

Throw-away linear heads read background, size, color, shape and the object's center from a frame's
tokens. The schedule matters more than the probe scores it ends with: heads on the concatenated
tokens first (which keeps places linearly readable), then on their mean, then again with a heavy
weight on the center. Towers trained with mean heads only never let the decoder learn motion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SmolVLMForConditionalGeneration

from v2l_fast.shapes.augment import augment
from v2l_fast.shapes.render import draw_frames
from v2l_fast.shapes.scene import BACKGROUNDS, COLORS, SHAPES, SIZES
from v2l_fast.shapes.vlm import IMAGE_SIZE, TOKENS_PER_FRAME, pixel_values, visual_tokens

_CLASSES = {
    "background": len(BACKGROUNDS),
    "size": len(SIZES),
    "color": len(COLORS),
    "shape": len(SHAPES),
}


@dataclass(frozen=True)
class Stage:
    """One part of the schedule: which view of the tokens the heads read, and how strongly."""

    steps: int
    reads: str
    lr: float
    center_weight: float


SCHEDULE = (
    Stage(800, "concat", 2e-3, 4.0),
    Stage(300, "mean", 1.5e-3, 4.0),
    Stage(600, "concat", 1.5e-3, 30.0),
)


def random_frames(batch: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Augmented frames [batch, 3, H, W] in 0..255 with objects all over them, and their labels."""

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
    """Linear readers of a frame's tokens, for pre-training only."""

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
        found = {name: head(x) for name, head in self.classes.items()}
        return found | {"center": self.center(x)}


def pretrain_vision(
    model: SmolVLMForConditionalGeneration,
    seed: int,
    batch: int = 256,
    schedule: tuple[Stage, ...] = SCHEDULE,
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, float]:
    """Train tower and connector in place; returns the last scores (accuracies, center mse)."""
    generator = torch.Generator().manual_seed(seed)
    width = model.config.text_config.hidden_size
    tower = [*model.model.vision_model.parameters(), *model.model.connector.parameters()]
    torch.manual_seed(seed)
    readers: dict[str, Heads] = {}
    scores: dict[str, float] = {}
    step = 0
    for index, stage in enumerate(schedule):
        heads = readers.setdefault(stage.reads, Heads(width, stage.reads))
        params = [*tower, *heads.parameters()]
        optimizer = torch.optim.AdamW(params, lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.01)
        last = index == len(schedule) - 1
        for k in range(stage.steps):
            warm = min(1.0, (k + 1) / 50)
            fade = 0.5 * (1 + math.cos(math.pi * k / stage.steps)) if last else 1.0
            for group in optimizer.param_groups:
                group["lr"] = stage.lr * warm * max(fade, 0.02)
            frames, labels = random_frames(batch, generator)
            found = heads(visual_tokens(model, pixel_values(frames)))
            loss = stage.center_weight * F.mse_loss(found["center"], labels["center"])
            for name in _CLASSES:
                loss = loss + F.cross_entropy(found[name], labels[name])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            step += 1
            if step % 50 == 0 or (last and k == stage.steps - 1):
                with torch.no_grad():
                    scores = {
                        name: (found[name].argmax(-1) == labels[name]).float().mean().item()
                        for name in _CLASSES
                    }
                    scores["center_mse"] = F.mse_loss(found["center"], labels["center"]).item()
                    scores["loss"] = loss.item()
                if report is not None:
                    report(step, scores)
    return scores
