"""The second and the third stage of the tiny VLM.

The first stage (`train`) sees clips of 8 s and eight frames. The second continues with recordings
of 2 to 64 s and 2 to 12 frames, most questions name an object by its shape or color, and for absent
objects the answer is "none"; the vision tower stays as it is. The third continues with one to three
objects, other styles, textured backgrounds and posts that hide a part of the objects.
"""

from __future__ import annotations

import copy
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, SmolVLMForConditionalGeneration

from v2l_fast.console import note, progress_bar
from v2l_fast.errors import CheckpointError
from v2l_fast.files import write_json
from v2l_fast.shapes.language import (
    QAPair,
    ask,
    ask_absent,
    ask_bound,
    ask_last,
    ask_ordinal,
    ask_several,
    describe,
)
from v2l_fast.shapes.looks import PLAIN, sample_look
from v2l_fast.shapes.render import augment
from v2l_fast.shapes.train import DecoderSettings, train_decoder, vision_parameters
from v2l_fast.shapes.vlm import (
    ADDED_WORDS,
    IMAGE_SIZE,
    VARIED_WORDS,
    Prompts,
    build_tokenizer,
    freeze,
    load_base,
    pixel_values,
    recorded_visual_tokens,
    save_base,
    sized_frames,
    visual_tokens,
)
from v2l_fast.shapes.world import (
    MAX_OBJECTS,
    Recording,
    Scene,
    sample_recordings,
    sample_scene,
    sample_scenes,
    sample_varied_recordings,
    sample_varied_scenes,
)
from v2l_fast.tensor_files import load_tensors, save_tensors


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


def widened_qa_pairs(scene: Scene, rng: random.Random, max_objects: int = 2) -> list[QAPair]:
    """A caption, both questions about places, and questions of which most name an object.

    Args:
        max_objects: see :func:`~v2l_fast.shapes.language.ask_absent`.
    """
    pairs = [ask(scene, kind, rng) for kind in ("caption", "start", "end")]
    pairs += ask_several(scene, 1, rng)
    pairs.append(ask_ordinal(scene, rng))
    pairs += [pair for _ in range(4) if (pair := ask_bound(scene, rng, True)) is not None]
    pairs += [ask_absent(scene, rng, True, max_objects) for _ in range(2)]
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
    began = time.perf_counter()
    model, tokenizer = _start(start, ADDED_WORDS, ADDED_WORDS, folder, seed, threads)
    scenes, recordings = recorded_videos("train", settings.videos, seed)
    return _train_on_recordings(
        model, tokenizer, scenes, recordings, settings, seed, "widening", widened_qa_pairs, folder,
        record, began, {"what": "second stage of the tiny SmolVLM of the shapes world"}, report,
    )  # fmt: skip


def _start(
    start: Path,
    added: tuple[str, ...],
    words: tuple[str, ...],
    folder: Path,
    seed: int,
    threads: int,
) -> tuple[SmolVLMForConditionalGeneration, PreTrainedTokenizerFast]:
    """The model of a finished stage with all parameters trainable and `added` words, which are the
    last of the tokenizer's `words`."""
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    model = load_base(start).model
    model.requires_grad_(True)
    add_words(model, added, seed)
    return model, build_tokenizer(words)


def _train_on_recordings(
    model: SmolVLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    scenes: Sequence[Scene],
    recordings: Sequence[Recording],
    settings: WideningSettings,
    seed: int,
    stage: str,
    qa_pairs: Callable[[Scene, random.Random], list[QAPair]],
    folder: Path,
    record: Path,
    began: float,
    about: Mapping[str, Any],
    report: Callable[[int, dict[str, float]], None] | None,
) -> dict[str, Any]:
    """Train the decoder on recordings; write the model to folder/base and the record to `record`.

    Args:
        stage: name of the stage, of its checkpoint and of its random choices.
        began: `time.perf_counter()` at the start of the stage.
        about: fields of the record besides settings, time and scores.

    Returns:
        The record.
    """
    with progress_bar(f"base model, {stage}") as bar:
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
        running: dict[str, float] = train_decoder(
            model, prompts, scenes, visual, settings, f"{stage}/{seed}",
            lambda number: prompts.recorded_prefix(recordings[number]), qa_pairs,
            folder / f"{stage}.safetensors", show,
        )["running"]  # fmt: skip
    save_base(model, tokenizer, folder / "base")
    result = {
        **about,
        "seed": seed,
        "settings": asdict(settings),
        "seconds": round(time.perf_counter() - began, 1),
        "threads": torch.get_num_threads(),
        "training": {name: round(value, 4) for name, value in sorted(running.items())},
    }
    write_json(record, result)
    note(f"the base model is in {folder / 'base'}, the record of its training in {record}")
    return result


# --- the third stage ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImitationSettings:
    """How the vision tower learns to see any look: for a frame of any look, its tokens become those
    of the tower before for the plain frame. The learning rate falls to 0 as a cosine."""

    steps: int = 2500
    batch: int = 160
    lr: float = 1e-3
    warmup: int = 100
    plain_share: float = 0.2


@dataclass(frozen=True)
class VaryingSettings(WideningSettings):
    """The schedule of the second stage, with more videos and steps."""

    videos: int = 16384
    lr: float = 1.2e-3
    caption_weight: float = 0.4
    decay: int = 2800
    steps: int = 6400


def varied_videos(
    split: str, count: int, seed: int, keep: Callable[[Scene], bool] = lambda scene: True
) -> tuple[list[Scene], list[Recording]]:
    """`count` scenes of one to three objects and any look, and how each is recorded.

    Args:
        keep: whether a scene may be drawn.
    """
    scenes = sample_varied_scenes(split, count, seed, keep=keep)
    return scenes, sample_varied_recordings(scenes, split, seed)


def varied_qa_pairs(scene: Scene, rng: random.Random) -> list[QAPair]:
    """As :func:`widened_qa_pairs`, with a detailed description and one more question that names an
    object."""
    pairs = [*widened_qa_pairs(scene, rng, MAX_OBJECTS), describe(scene, rng)]
    bound = ask_bound(scene, rng, True, {"motion": 3.0})
    return pairs if bound is None else [*pairs, bound]


def imitate_plain(
    model: SmolVLMForConditionalGeneration,
    seed: int,
    settings: ImitationSettings,
    report: Callable[[int, float], None] = lambda step, error: None,
) -> float:
    """Train tower and connector in place (see :class:`ImitationSettings`).

    Returns:
        A running mean of the squared error, as a share of the tokens' variance.
    """
    vision = nn.ModuleList([model.model.vision_model, model.model.connector])
    teacher = copy.deepcopy(model)
    freeze(teacher)
    optimizer = torch.optim.AdamW(
        vision.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    generator = torch.Generator().manual_seed(seed)
    error = 1.0
    for step in range(settings.steps):
        rng = random.Random(f"imitation/{seed}/{step}")
        frames, plain = _frame_pairs(rng, settings)
        with torch.no_grad():
            expected = visual_tokens(teacher, pixel_values(plain))
        seen = visual_tokens(model, pixel_values(augment(frames, generator)))
        loss = F.mse_loss(seen, expected) / expected.var()
        fade = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * min(1.0, (step + 1) / settings.warmup) * fade
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vision.parameters(), 1.0)
        optimizer.step()
        error = loss.item() if step == 0 else 0.98 * error + 0.02 * loss.item()
        report(step + 1, error)
    return error


def _frame_pairs(rng: random.Random, settings: ImitationSettings) -> tuple[Tensor, Tensor]:
    """Frames of any look, some of them drawn at another size and resized, and the same frames with
    a plain look, float32 [batch, 3, H, W] in 0..255."""
    frames, plain = [], []
    sizes = [IMAGE_SIZE] * 6 + [rng.choice((32, 64, 96, 144)) for _ in range(2)]
    for size in sizes:
        scenes = [sample_scene(rng) for _ in range(settings.batch // len(sizes))]
        moment = [rng.random()]
        looks = [PLAIN if rng.random() < settings.plain_share else sample_look(rng) for _ in scenes]
        seen = [replace(scene, look=look) for scene, look in zip(scenes, looks, strict=True)]
        frames.append(sized_frames(seen, size, moment))
        plain.append(sized_frames(scenes, IMAGE_SIZE, moment))
    return torch.cat(frames), torch.cat(plain)


def vary_base(
    start: Path,
    folder: Path,
    record: Path,
    seed: int = 0,
    settings: VaryingSettings | None = None,
    imitation: ImitationSettings | None = None,
    threads: int = 1,
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """As :func:`widen_base`, from its base: one to three objects of any look.

    The vision tower learns the looks first; folder/tower.safetensors is written once.

    Raises:
        CheckpointError: a file in the folder is broken, or of other settings.
        ConfigError: scikit-image is not installed.
    """
    settings, imitation = settings or VaryingSettings(), imitation or ImitationSettings()
    began = time.perf_counter()
    model, tokenizer = _start(
        start, VARIED_WORDS, ADDED_WORDS + VARIED_WORDS, folder, seed, threads
    )
    error = _imitation_stage(model, folder / "tower.safetensors", seed, imitation)
    scenes, recordings = varied_videos("train", settings.videos, seed)
    about = {
        "what": "third stage of the tiny SmolVLM of the shapes world",
        "imitation": {**asdict(imitation), "error": round(error, 4)},
    }
    return _train_on_recordings(
        model, tokenizer, scenes, recordings, settings, seed, "varying", varied_qa_pairs, folder,
        record, began, about, report,
    )  # fmt: skip


def _imitation_stage(
    model: SmolVLMForConditionalGeneration, path: Path, seed: int, settings: ImitationSettings
) -> float:
    """Train tower and connector, or load them from `path`; return the error at the end."""
    parts = vision_parameters(model)
    identity = json.dumps({"seed": seed, **asdict(settings)})
    if path.exists():
        tensors, metadata = load_tensors(path, CheckpointError)
        if tensors.keys() != parts.keys() or metadata.get("settings") != identity:
            raise CheckpointError(
                f"{path}: the vision tower of another model or of other settings; delete it to "
                "train again"
            )
        model.load_state_dict(tensors, strict=False)
        return float(metadata["error"])
    with progress_bar("base model, vision tower") as bar:
        error = imitate_plain(
            model, seed, settings,
            lambda step, mean: bar(f"step, error {mean:.3f}", step, settings.steps),
        )  # fmt: skip
    save_tensors(vision_parameters(model), path, {"error": f"{error:.6f}", "settings": identity})
    return error
