"""The language half of the tiny VLM's training: its decoder on the frozen tower's tokens.

Responsible for the decoder's data order, loss and schedule. Every step depends on (seed, step)
alone, so resuming needs no more than the step. Direction of motion is learned last, after a
plateau; place questions ("where does the object start?") are its stepping stones, and the learning
rate stays flat until it is there.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SmolVLMForConditionalGeneration

from v2l_fast.shapes.augment import augment
from v2l_fast.shapes.language import PLACE_KINDS, Turn, ask, ask_several
from v2l_fast.shapes.prompts import Prompts
from v2l_fast.shapes.render import FRAME_TIMES, render
from v2l_fast.shapes.scene import Scene
from v2l_fast.shapes.vlm import IMAGE_SIZE, freeze, video_tokens
from v2l_fast.training.batches import PackedTurns, pack_turns
from v2l_fast.training.checkpoint import load_checkpoint, named_parameters, save_checkpoint


@dataclass(frozen=True)
class LanguageSettings:
    """Steps and sizes. Decay starts when motion questions reach `motion_goal` (a running mean over
    training batches) and at least `min_flat` steps are done, or after `max_flat` steps."""

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


@torch.no_grad()
def cache_visual_tokens(
    model: SmolVLMForConditionalGeneration,
    scenes: Sequence[Scene],
    seed: int | None,
    times: Sequence[float] = FRAME_TIMES,
    chunk: int = 64,
    report: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Visual tokens [B, F, T, D] of the scenes' frames at `times`, augmented unless `seed` is
    None."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, len(scenes), chunk):
        report(start)
        frames = render(scenes[start : start + chunk], IMAGE_SIZE, times)
        if generator is not None:
            frames = augment(frames.flatten(0, 1).float(), generator).view(frames.shape)
        parts.append(video_tokens(model, frames))
    return torch.cat(parts)


def video_turns(scene: Scene, questions: int, rng: random.Random) -> list[Turn]:
    """One caption, both place questions and `questions` others, order and binding favored."""
    kinds = ("caption", *PLACE_KINDS)
    return [*(ask(scene, kind, rng) for kind in kinds), *ask_several(scene, questions, rng)]


def answer_logits(
    model: SmolVLMForConditionalGeneration, packed: PackedTurns, visual: Tensor
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
    """Warm-up, flat, then linear from `decay_from` on (None: still flat) for `decay` steps."""
    rate = settings.lr * min(1.0, (step + 1) / settings.warmup)
    if decay_from is None:
        return rate
    left = max(0.0, 1 - (step - decay_from) / settings.decay)
    return settings.final_lr + (rate - settings.final_lr) * left


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

    scenes, visual [B, F, T, D]: the training videos and their cached visual tokens.
    Returns the steps done and the seconds they took, those before a resume included.
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
        shown = [rng.random() >= settings.no_video_share for _ in picks]
        asked = [video_turns(scenes[i], settings.questions, rng) for i in picks]
        packed = pack_turns(
            [prompts.video_prefix if see else prompts.text_prefix for see in shown],
            [[(prompts.question(t.question), prompts.answer(t.answer)) for t in r] for r in asked],
            pad,
        )
        keep = torch.tensor([i for i, see in zip(picks, shown, strict=True) if see])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, decay_from)
        logits = answer_logits(model, packed, visual[keep].flatten(0, 2))
        losses = F.cross_entropy(logits, packed.targets, reduction="none")
        kinds = [turn.kind for row in asked for turn in row]
        is_caption = torch.tensor([kind == "caption" for kind in kinds])[packed.turns]
        share = settings.caption_weight
        loss = share * losses[is_caption].mean() + (1 - share) * losses[~is_caption].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        step += 1
        seen = [see for see, row in zip(shown, asked, strict=True) for _ in row]
        _track(running, kinds, seen, packed, logits, loss.item())
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


def _track(
    running: dict[str, float],
    kinds: list[str],
    seen: list[bool],
    packed: PackedTurns,
    logits: Tensor,
    loss: float,
) -> None:
    """Update running means: the loss, and by kind the share of answers that are all right."""
    wrong = torch.zeros(len(kinds)).index_add_(
        0, packed.turns, (logits.detach().argmax(-1) != packed.targets).float()
    )
    right = (wrong == 0).tolist()
    rates: dict[str, list[bool]] = {}
    for kind, see, ok in zip(kinds, seen, right, strict=True):
        if see:
            rates.setdefault(kind, []).append(ok)
    values = {"loss": loss} | {kind: sum(oks) / len(oks) for kind, oks in rates.items()}
    for name, value in values.items():
        running[name] = value if name not in running else 0.97 * running[name] + 0.03 * value
