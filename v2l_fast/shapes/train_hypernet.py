"""The hypernetwork of the shapes world: contexts, targets and the loss of one step.

Responsible for what is special to this world; the loop, checkpoints and schedule are
`v2l_fast.training`'s. Targets are the scenes' true captions and answers, not a teacher's: the truth
is known here, and the tiny teacher is wrong about a part of it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from v2l_fast.backbones.smolvlm import SmolVLM
from v2l_fast.config import HypernetConfig
from v2l_fast.hypernet import HyperNetwork
from v2l_fast.shapes.base import load_base
from v2l_fast.shapes.language import Turn, ask, ask_several
from v2l_fast.shapes.prompts import Prompts
from v2l_fast.shapes.render import FRAME_TIMES
from v2l_fast.shapes.scene import Scene, sample_scenes
from v2l_fast.shapes.train_language import cache_visual_tokens
from v2l_fast.shapes.vlm import IMAGE_SIZE
from v2l_fast.training.loss import answer_cross_entropy
from v2l_fast.training.step import answer_logits, generate_adapters
from v2l_fast.training.trainer import TrainSettings, train, write_record
from v2l_fast.training.turns import pack_turns


def shapes_hypernet_config(backbone: SmolVLM) -> HypernetConfig:
    """A small hypernetwork of the released architecture for the tiny VLM's down projections."""
    text = backbone.decoder.config
    return HypernetConfig(
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        target_modules={"down_proj": (text.intermediate_size, text.hidden_size)},
        rank=8,
        latent_size=128,
        num_latents=8,
        num_blocks=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        base_model_name_or_path="shapes",
        max_frames=len(FRAME_TIMES),
        longest_edge=IMAGE_SIZE,
        target_fps=1.0,
    )


@torch.no_grad()
def cache_contexts(
    backbone: SmolVLM, scenes: Sequence[Scene], seed: int | None, chunk: int = 128
) -> Tensor:
    """Hidden states entering every decoder layer on `[video] + instruction`: bf16 [B, L, S, D].

    Frames are augmented unless `seed` is None.
    """
    decoder = backbone.decoder
    ids = torch.tensor(Prompts(backbone.tokenizer).context)[None]
    image = (ids == backbone.image_token_id)[..., None]
    words = decoder.embed(ids)
    parts = []
    for start in range(0, len(scenes), chunk):
        some = scenes[start : start + chunk]
        visual = cache_visual_tokens(backbone.model, some, None if seed is None else seed + start)
        embeds = words.repeat(len(some), 1, 1).masked_scatter(image, visual.flatten(0, 2))
        states = torch.stack(list(decoder.layer_inputs(embeds)), dim=1)
        parts.append(states.to(torch.bfloat16))
    return torch.cat(parts)


@dataclass(frozen=True)
class ShapesTask:
    """Loss of one training step: half over captions, half over `questions` others a video."""

    backbone: SmolVLM
    prompts: Prompts
    scenes: Sequence[Scene]
    contexts: Tensor
    seed: int
    questions: int = 3

    def turns(self, index: int, step: int) -> list[Turn]:
        """One caption and some questions; which ones depends on (seed, step, video)."""
        rng = random.Random(f"{self.seed}/{step}/{index}")
        scene = self.scenes[index]
        return [ask(scene, "caption", rng), *ask_several(scene, self.questions, rng)]

    def loss(
        self, hypernet: HyperNetwork, indices: list[int], step: int
    ) -> tuple[Tensor, dict[str, float]]:
        """Scalar loss and its parts for the videos `indices`."""
        features = self.contexts[torch.tensor(indices)].float()
        batch = generate_adapters(hypernet, features, recompute=False)
        asked = [self.turns(index, step) for index in indices]
        prompts = self.prompts
        packed = pack_turns(
            [prompts.text_prefix] * len(indices),
            [[(prompts.question(t.question), prompts.answer(t.answer)) for t in r] for r in asked],
            prompts.tokenizer.pad_token_id,
        )
        logits = answer_logits(
            self.backbone.decoder, packed, batch, torch.arange(len(indices))
        )
        kinds = [turn.kind for row in asked for turn in row]
        losses = answer_cross_entropy(logits, packed.targets, packed.turns, len(kinds))
        is_caption = torch.tensor([kind == "caption" for kind in kinds])
        caption, question = losses[is_caption].mean(), losses[~is_caption].mean()
        parts = {"caption": caption.item(), "question": question.item()}
        return 0.5 * caption + 0.5 * question, parts


def train_hypernet(
    base: Path,
    folder: Path,
    record: Path,
    settings: TrainSettings,
    videos: int,
    threads: int = 1,
) -> dict[str, Any]:
    """Train on `videos` scenes, write folder/hypernet and the run's record."""
    torch.set_num_threads(threads)
    backbone = load_base(base)
    started = time.perf_counter()
    scenes = sample_scenes("train", videos, settings.seed)
    contexts = cache_contexts(backbone, scenes, settings.seed)
    cached = time.perf_counter() - started
    torch.manual_seed(settings.seed)
    hypernet = HyperNetwork(shapes_hypernet_config(backbone))
    task = ShapesTask(backbone, Prompts(backbone.tokenizer), scenes, contexts, settings.seed)
    result = train(
        hypernet,
        lambda indices, step: task.loss(hypernet, indices, step),
        len(scenes),
        settings,
        folder / "hypernet-checkpoints",
    )
    hypernet.to(torch.bfloat16).save_pretrained(folder / "hypernet")
    result = {
        "what": "hypernetwork of the shapes world",
        "targets": "ground-truth captions and answers",
        "config": hypernet.config.to_dict(),
        "cache_seconds": round(cached, 1),
        "threads": threads,
        **result,
    }
    write_record(record, result)
    return result
