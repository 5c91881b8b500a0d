"""The tiny vision-language model: transformers' SmolVLM classes at toy sizes.

Responsible for its configuration, visual tokens, tokenizer, folder (a checkpoint like any other
SmolVLM's) and the token ids of its prompts. Training is `train`'s.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.llama.configuration_llama import LlamaConfig

from v2l_fast.files import write_json
from v2l_fast.hypernet.config import INSTRUCTION
from v2l_fast.shapes.render import CLIP_SECONDS, FRAME_TIMES, TIMESTAMPS, augment, render
from v2l_fast.shapes.world import (
    BACKGROUNDS,
    COLORS,
    MOTIONS,
    SHAPES,
    SIZES,
    Recording,
    Scene,
)
from v2l_fast.vlm.smolvlm import (
    CHAT_START,
    END_OF_UTTERANCE,
    FAKE_TOKEN,
    GLOBAL_TOKEN,
    IMAGE_TOKEN,
    SmolVLM,
    chat,
    row_col_token,
    spell_number,
    video_text,
)

IMAGE_SIZE = 48
TOKENS_PER_FRAME = 4


def shapes_vlm_config(
    vocab_size: int, image_token_id: int, pad_token_id: int, bos_token_id: int, eos_token_id: int
) -> SmolVLMConfig:
    """SmolVLM with a 64-wide two-layer vision tower and a 96-wide four-layer text decoder."""
    special = dict(pad_token_id=pad_token_id, bos_token_id=bos_token_id, eos_token_id=eos_token_id)
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        **special,
    )
    vision = dict(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
    )
    return SmolVLMConfig(
        text_config=text.to_dict(),
        vision_config=vision,
        scale_factor=3,
        image_token_id=image_token_id,
        tie_word_embeddings=True,
        **special,
    )


def pixel_values(frames: Tensor) -> Tensor:
    """uint8 or float frames in 0..255 to the model's range: (x - 127.5) / 127.5, float32."""
    return (frames.float() - 127.5) / 127.5


def visual_tokens(model: SmolVLMForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Connector outputs [N, tokens per frame, D] of pixel values [N, 3, H, W]."""
    core = model.model
    return core.connector(core.vision_model(pixel_values=pixels).last_hidden_state)


def video_tokens(model: SmolVLMForConditionalGeneration, frames: Tensor) -> Tensor:
    """Visual tokens [B, F, T, D] of frames [B, F, 3, H, W] in 0..255."""
    tokens = visual_tokens(model, pixel_values(frames.flatten(0, 1)))
    return tokens.unflatten(0, frames.shape[:2])


@torch.no_grad()
def cache_visual_tokens(
    model: SmolVLMForConditionalGeneration,
    scenes: Sequence[Scene],
    seed: int | None,
    times: Sequence[float] = FRAME_TIMES,
    report: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Visual tokens [B, F, T, D] of the scenes' frames at `times`; augmented unless `seed` is
    None."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, len(scenes), 64):
        report(start)
        frames = render(scenes[start : start + 64], IMAGE_SIZE, times)
        if generator is not None:
            frames = augment(frames.flatten(0, 1).float(), generator).view(frames.shape)
        parts.append(video_tokens(model, frames))
    return torch.cat(parts)


@torch.no_grad()
def recorded_visual_tokens(
    model: SmolVLMForConditionalGeneration,
    scenes: Sequence[Scene],
    recordings: Sequence[Recording],
    seed: int | None,
    report: Callable[[int], None] = lambda done: None,
) -> list[Tensor]:
    """Visual tokens [F, T, D] in bfloat16 of each scene's recording; augmented unless `seed` is
    None, every fifth video being drawn at another size and resized."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    tokens: list[Tensor] = []
    for start in range(0, len(scenes), 64):
        report(start)
        frames = []
        for index in range(start, min(start + 64, len(scenes))):
            size = IMAGE_SIZE
            if generator is not None and index % 5 == 0:
                size = (32, 64, 96, 144)[index // 5 % 4]
            frames.append(sized_frames([scenes[index]], size, recordings[index].times))
        together = torch.cat(frames)
        if generator is not None:
            together = augment(together, generator)
        cached = visual_tokens(model, pixel_values(together)).to(torch.bfloat16)
        tokens += cached.split([len(video) for video in frames])
    return tokens


def sized_frames(scenes: Sequence[Scene], size: int, times: Sequence[float]) -> Tensor:
    """Frames float32 [B * F, 3, H, W] in 0..255, drawn at `size`, then resized for the model."""
    frames = render(scenes, size, times).flatten(0, 1).float()
    if size != IMAGE_SIZE:
        shape = (IMAGE_SIZE, IMAGE_SIZE)
        frames = F.interpolate(frames, shape, mode="bicubic", antialias=True).clamp_(0, 255)
    return frames


def freeze(module: nn.Module) -> None:
    """Evaluation mode, no gradients."""
    module.eval()
    module.requires_grad_(False)


def seeded_model(config: SmolVLMConfig, seed: int) -> SmolVLMForConditionalGeneration:
    """A newly initialized model that depends on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SmolVLMForConditionalGeneration(config)


# --- the tokenizer --------------------------------------------------------------------------------

# Word-level, and accepts the real prompt text: SmolVLM2's special tokens under their own names,
# whole prompt phrases as single tokens (so that a tiny decoder spends its context on frames), and
# the words of `language`. Text is lower-cased; white space only separates tokens, except for the
# prompt's line breaks.
PAD_TOKEN = "<pad>"
UNK_TOKEN = "<unk>"
BOS_TOKEN = CHAT_START
MAX_TILES = 4
MAX_SECONDS = 120
MAX_FRAMES = 64

CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}"
    "{% elif line['type'] == 'video' %}{{ '<video>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

_PHRASES = (
    "internalize this video for later captioning.",
    "you are provided the following series of",
    "frames from a",
    "[h:mm:ss] video.\n",
    "user:",
    "assistant:",
    "\n\n",
    "\n",
)
_WORDS = """
    first then a on background moves stays describe the video what happens in caption this color is
    how many objects are there shape size object second does move which comes or where start end
    it of an and it's zero top middle center bottom yes no
""".split()
_PUNCTUATION = (".", ",", "?", "!", ":", "'")


def special_tokens() -> list[str]:
    """All special tokens, in id order."""
    tiles = [row_col_token(r, c) for r in range(1, MAX_TILES + 1) for c in range(1, MAX_TILES + 1)]
    named = [PAD_TOKEN, UNK_TOKEN, BOS_TOKEN, END_OF_UTTERANCE, FAKE_TOKEN, GLOBAL_TOKEN]
    return [*named, IMAGE_TOKEN, *tiles]


# Words that the second and the third stage of the base model add, after all others.
ADDED_WORDS = ("none", "motion")
VARIED_WORDS = ("third",)


def vocabulary(added: tuple[str, ...] = ()) -> list[str]:
    """Every token, in id order; `added` words come last."""
    clocks = [f"\nframe from {s // 60:02d}:{s % 60:02d}:" for s in range(MAX_SECONDS)]
    durations = [f"0:{s // 60:02d}:{s % 60:02d}" for s in range(MAX_SECONDS)]
    numbers = [spell_number(n) for n in range(1, MAX_FRAMES + 1)]
    names = [*BACKGROUNDS, *COLORS, *SHAPES, *SIZES, *MOTIONS]
    tokens = [
        *special_tokens(),
        *_PHRASES,
        *clocks,
        *durations,
        *numbers,
        *names,
        *_WORDS,
        *_PUNCTUATION,
        *added,
    ]
    return list(dict.fromkeys(tokens))


def build_tokenizer(added: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """The tokenizer, ready for `save_pretrained`; `added`: see :func:`vocabulary`."""
    core = Tokenizer(
        models.WordLevel(
            {token: i for i, token in enumerate(vocabulary(added))}, unk_token=UNK_TOKEN
        )
    )
    core.normalizer = normalizers.Lowercase()
    pieces = [
        r"\nframe from [0-9]+:[0-9]+:",
        r"[0-9]+:[0-9]+:[0-9]+",
        *(re.escape(phrase).replace("\\\n", r"\n").replace("\\ ", " ") for phrase in _PHRASES),
        r"[a-z]+(?:-[a-z]+)?",
        r"[0-9]+",
        r"[^\sa-z0-9]",
    ]
    core.pre_tokenizer = pre_tokenizers.Split(
        Regex("|".join(pieces)), behavior="removed", invert=True
    )
    # This decoder joins words with spaces and removes those before punctuation.
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD_TOKEN,
        unk_token=UNK_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=END_OF_UTTERANCE,
        additional_special_tokens=special_tokens()[4:],
        model_max_length=1024,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


# --- the folder -----------------------------------------------------------------------------------


ASSETS = Path(__file__).resolve().parent.parent / "assets" / "shapes"
BASE_FOLDER = ASSETS / "base"

_PREPROCESSOR = {
    "image_processor_type": "SmolVLMImageProcessor",
    "processor_class": "SmolVLMProcessor",
    "do_convert_rgb": True,
    "do_image_splitting": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "max_image_size": {"longest_edge": IMAGE_SIZE},
    "resample": 1,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": IMAGE_SIZE},
    "video_sampling": {
        "fps": 1,
        "max_frames": 64,
        "video_size": {"longest_edge": IMAGE_SIZE},
    },
}


def new_base(seed: int) -> tuple[SmolVLMForConditionalGeneration, PreTrainedTokenizerFast]:
    """An untrained model and its tokenizer."""
    tokenizer = build_tokenizer()
    config = shapes_vlm_config(
        vocab_size=len(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return seeded_model(config, seed), tokenizer


def save_base(
    model: SmolVLMForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: str | Path
) -> None:
    """Write weights in bfloat16, config, generation config, tokenizer and preprocessor config."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = model.dtype
    model.to(torch.bfloat16).save_pretrained(folder)
    model.to(dtype)
    tokenizer.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", _PREPROCESSOR)


def load_base(folder: str | Path = BASE_FOLDER) -> SmolVLM:
    """The frozen model as a backbone, in float32.

    Raises CheckpointError if the folder is missing or incomplete.
    """
    return SmolVLM.from_pretrained(folder)


# --- prompts --------------------------------------------------------------------------------------


def shapes_video_text() -> str:
    """The text of a shapes clip in the user's turn: eight untiled frames."""
    return video_text(len(TIMESTAMPS), TIMESTAMPS, CLIP_SECONDS, 0, 0, TOKENS_PER_FRAME)


@dataclass(frozen=True)
class Prompts:
    """Token ids of prompts, cached by text.

    A prompt is a prefix (the opening of the user's turn, with or without a video) and a question;
    the ids of its parts concatenate to those of the whole text, so questions can share a prefix.
    """

    tokenizer: PreTrainedTokenizerBase

    def ids(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._cache[text]

    @cached_property
    def _cache(self) -> dict[str, list[int]]:
        return {}

    @cached_property
    def video_prefix(self) -> list[int]:
        return self.ids(chat(shapes_video_text(), False).removesuffix("<end_of_utterance>\n"))

    def recorded_prefix(self, recording: Recording) -> list[int]:
        """As :attr:`video_prefix`, of any recording."""
        stamps = recording.timestamps
        text = video_text(len(stamps), stamps, recording.duration, 0, 0, TOKENS_PER_FRAME)
        return self.ids(chat(text, False).removesuffix("<end_of_utterance>\n"))

    def recorded_context(self, recording: Recording) -> list[int]:
        """As :attr:`context`, of any recording."""
        return self.recorded_prefix(recording) + self.ids(f"{INSTRUCTION}<end_of_utterance>\n")

    @cached_property
    def text_prefix(self) -> list[int]:
        return self.ids(chat("", False).removesuffix("<end_of_utterance>\n"))

    @cached_property
    def context(self) -> list[int]:
        """`[video] + instruction`, the prompt of the context pass."""
        return self.video_prefix + self.ids(f"{INSTRUCTION}<end_of_utterance>\n")

    def question(self, text: str) -> list[int]:
        """The rest of the user's turn and the opening of the assistant's."""
        return self.ids(f"{text}<end_of_utterance>\nAssistant:")

    def answer(self, text: str) -> list[int]:
        return self.ids(f" {text}<end_of_utterance>")

    def second_turn(self, first: str, answer: str, text: str) -> list[int]:
        """As :meth:`question`, after another question and its answer."""
        before = self.question(first) + self.answer(answer)
        return before + self.ids("\nUser: ") + self.question(text)
