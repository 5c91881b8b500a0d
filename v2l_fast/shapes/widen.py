"""The second stage of the tiny VLM: any duration, which object is meant, and absent objects.

The first stage (`train`) sees clips of 8 s and eight frames. This one continues with recordings of
2 to 64 s and 2 to 12 frames, most questions name an object by its shape or color, and for absent
objects the answer is "none". The vision tower stays as it is.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import SmolVLMForConditionalGeneration

from v2l_fast.console import note, progress_bar
from v2l_fast.files import write_json
from v2l_fast.shapes.language import (
    QAPair,
    ask,
    ask_absent,
    ask_bound,
    ask_last,
    ask_ordinal,
    ask_several,
)
from v2l_fast.shapes.train import DecoderSettings, train_decoder
from v2l_fast.shapes.vlm import (
    ADDED_WORDS,
    Prompts,
    build_tokenizer,
    load_base,
    recorded_visual_tokens,
    save_base,
)
from v2l_fast.shapes.world import Recording, Scene, sample_recordings, sample_scenes


@dataclass(frozen=True)
class WideningSettings(DecoderSettings):
    """Constant learning rate after a warm-up, then a linear decay over the last of `steps`."""

    videos: int = 12288
    batch: int = 20
    no_video_share: float = 0.1
    lr: float = 1.5e-3
    final_lr: float = 3e-5
    warmup: int = 100
    weight_decay: float = 0.05
    decay: int = 2000
    caption_weight: float = 0.35
    checkpoint_every: int = 200
    steps: int = 6000

    def decay_from(self, step: int, running: Mapping[str, float]) -> int:
        return self.steps - self.decay

    def rate(self, step: int, decay_from: int | None) -> float:
        rate = self.lr * min(1.0, (step + 1) / self.warmup)
        remaining = min(1.0, (self.steps - step) / self.decay)
        return self.final_lr + (rate - self.final_lr) * remaining


def recorded_videos(split: str, count: int, seed: int) -> tuple[list[Scene], list[Recording]]:
    """`count` scenes of a split and how each is recorded; the training scenes are those of the
    first stage."""
    return sample_scenes(split, count, seed), sample_recordings(split, count, seed)


def widened_qa_pairs(scene: Scene, rng: random.Random) -> list[QAPair]:
    """A caption, both questions about places, and questions of which most name an object."""
    pairs = [ask(scene, kind, rng) for kind in ("caption", "start", "end")]
    pairs += ask_several(scene, 1, rng)
    pairs.append(ask_ordinal(scene, rng))
    pairs += [pair for _ in range(4) if (pair := ask_bound(scene, rng, True)) is not None]
    pairs += [ask_absent(scene, rng, True) for _ in range(2)]
    if rng.random() < 0.5 and (pair := ask_last(scene, rng)) is not None:
        pairs.append(pair)
    return pairs


def add_words(model: SmolVLMForConditionalGeneration, words: tuple[str, ...], seed: int) -> None:
    """Append embeddings of new words: the mean of all and some noise."""
    old = model.get_input_embeddings().weight.detach().clone()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(words), old.shape[1], generator=generator) * old.std()
    model.resize_token_embeddings(len(old) + len(words), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.cat([old, old.mean(0) + noise]))


def widen_base(
    start: Path,
    folder: Path,
    record: Path,
    seed: int = 0,
    settings: WideningSettings | None = None,
    threads: int = 1,
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Train the base in `start` further; write it to folder/base and the run's record to `record`.

    Raises:
        CheckpointError: a checkpoint in the folder is broken, or of other settings.
    """
    settings = settings or WideningSettings()
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    model = load_base(start).model
    model.requires_grad_(True)
    tokenizer = build_tokenizer(ADDED_WORDS)
    add_words(model, ADDED_WORDS, seed)
    scenes, recordings = recorded_videos("train", settings.videos, seed)
    with progress_bar("base model, second stage") as bar:
        visual = recorded_visual_tokens(
            model, scenes, recordings, seed,
            report=lambda done: bar("visual tokens, video", done, len(scenes)),
        )  # fmt: skip

        def show(step: int, running: dict[str, float]) -> None:
            names = ("loss", "caption", "binding", "absent")
            texts = (f"{name} {running[name]:.3f}" for name in names if name in running)
            bar(" ".join(["step,", *texts]), step, settings.steps)
            if report is not None:
                report(step, running)

        prompts = Prompts(tokenizer)
        running = train_decoder(
            model, prompts, scenes, visual, settings, f"widening/{seed}",
            lambda number: prompts.recorded_prefix(recordings[number]), widened_qa_pairs,
            folder / "widening.safetensors", show,
        )["running"]  # fmt: skip
    save_base(model, tokenizer, folder / "base")
    result = {
        "what": "second stage of the tiny SmolVLM of the shapes world",
        "seed": seed,
        "settings": asdict(settings),
        "seconds": round(time.perf_counter() - began, 1),
        "threads": threads,
        "training": {name: round(value, 4) for name, value in sorted(running.items())},
    }
    write_json(record, result)
    note(f"the base model is in {folder / 'base'}, the record of its training in {record}")
    return result
