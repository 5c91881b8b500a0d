"""SmolVLM2: prompts, vision embedding and decoder of the family the paper trains on.

Model, weights and tokenizer are those of transformers. Preprocessing and prompt text are
implemented here and fixed to transformers 4.51.3 at batch size 1 (as the released `infer.py` runs):
later processors silently sample, resize and word prompts differently.

A prompt's strings (counts in words, timestamps, image tokens, chat turns) equal those that
transformers 4.51.3 builds for one conversation with one video. Its batched call prints the last
video's duration for every conversation; here a prompt depends on its own video alone.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, SmolVLMForConditionalGeneration
from transformers.utils import logging as transformers_logging

from v2l_fast.device import compiled, send
from v2l_fast.errors import CheckpointError, ConfigError
from v2l_fast.video import Clip
from v2l_fast.video.preprocess import PREPROCESSING_VERSION, normalize
from v2l_fast.vlm.base import Prompt, Question, VideoChunk, conversation, iter_views
from v2l_fast.vlm.decoder import Decoder
from v2l_fast.vlm.tokenization import PromptTokenizer
from v2l_fast.work_units import WorkUnit, run_to_completion

# Maximum views per vision call: 64 of 1,024 patches keep activations under 2 GB.
VIEWS_PER_CHUNK = 64
# Patches per vision call on a CPU: a few seconds of SmolVLM2-500M's tower.
PATCHES_CPU = 4096

FAKE_TOKEN = "<fake_token_around_image>"
GLOBAL_TOKEN = "<global-img>"
IMAGE_TOKEN = "<image>"
END_OF_UTTERANCE = "<end_of_utterance>"
CHAT_START = "<|im_start|>"
# Start of a prompt with the user's turn.
TURN_START = f"{CHAT_START}User: "
# Between a video's last special token and the user's text.
AFTER_VIDEO = "\n\n"

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
_TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()


# --- prompts --------------------------------------------------------------------------------------


def spell_number(n: int) -> str:
    """English words of `n` in 0..9999, as `num2words(n)` writes them ("one hundred and one").

    Raises ConfigError outside that range.
    """
    if not 0 <= n <= 9999:
        raise ConfigError(f"cannot spell {n}: a prompt names 0 to 9999 frames; sample fewer frames")
    if n < 20:
        return _ONES[n]
    if n < 100:
        tens, ones = divmod(n, 10)
        return _TENS[tens] + (f"-{_ONES[ones]}" if ones else "")
    if n < 1000:
        hundreds, rest = divmod(n, 100)
        return f"{_ONES[hundreds]} hundred" + (f" and {spell_number(rest)}" if rest else "")
    thousands, rest = divmod(n, 1000)
    head = f"{_ONES[thousands]} thousand"
    if not rest:
        return head
    # A remainder below one hundred is joined by "and", a larger one (which has its own) by a comma.
    return f"{head} and {spell_number(rest)}" if rest < 100 else f"{head}, {spell_number(rest)}"


def row_col_token(row: int, col: int) -> str:
    """Special token before the tile at 1-based (row, col)."""
    return f"<row_{row}_col_{col}>"


def frame_text(rows: int, cols: int, tokens_per_view: int) -> str:
    """Tokens of one frame: rows x cols tiles row-major, then the global view; 0 x 0 is untiled."""
    patches = IMAGE_TOKEN * tokens_per_view
    view = f"{FAKE_TOKEN}{GLOBAL_TOKEN}{patches}{FAKE_TOKEN}"
    if rows == 0 and cols == 0:
        return view
    tiles = "".join(
        "".join(f"{FAKE_TOKEN}{row_col_token(r, c)}{patches}" for c in range(1, cols + 1)) + "\n"
        for r in range(1, rows + 1)
    )
    return f"{tiles}\n{view}"


def video_text(
    num_frames: int,
    timestamps: Sequence[float],
    duration: float,
    rows: int,
    cols: int,
    tokens_per_view: int,
) -> str:
    """The text of a video in the user's turn; the user's own text follows it directly.

    timestamps: seconds, one per frame (index / fps), printed as MM:SS, minutes not wrapped at 60.
    duration: seconds of the whole source, truncated to whole seconds as H:MM:SS.
    rows, cols: tiles of a frame, 0 and 0 when it is not split.
    Raises ConfigError when the number of timestamps is not `num_frames`.
    """
    if len(timestamps) != num_frames:
        raise ConfigError(f"{len(timestamps)} timestamps for {num_frames} frames: pass one each")
    length = timedelta(seconds=int(duration))
    intro = (
        f"You are provided the following series of {spell_number(num_frames)} frames "
        f"from a {length} [H:MM:SS] video.\n"
    )
    views = frame_text(rows, cols, tokens_per_view)
    frames = (f"\nFrame from {int(t // 60):02d}:{int(t % 60):02d}:{views}" for t in timestamps)
    return intro + "".join(frames) + AFTER_VIDEO


def turn_end(add_generation_prompt: bool) -> str:
    """The end of a user's turn, and the start of the assistant's if an answer follows."""
    return f"{END_OF_UTTERANCE}\n" + ("Assistant:" if add_generation_prompt else "")


def chat(text: str, add_generation_prompt: bool) -> str:
    """A user's turn with `text`, and the start of the assistant's if an answer follows."""
    return TURN_START + text + turn_end(add_generation_prompt)


def chat_pieces(question: Question, video: str, answer_follows: bool) -> list[str]:
    """Template and untrusted text in turn, as :meth:`PromptTokenizer.encode` takes them.

    Args:
        video: text of the video, in the user's first turn; may be empty.
    """
    template, pieces = CHAT_START, []
    for role, text in conversation(question):
        template += f"{role.capitalize()}: "
        if role == "user":
            template, video = template + video, ""
        pieces += [template, text]
        template = turn_end(False)
    return [*pieces, turn_end(answer_follows)]


@dataclass(frozen=True)
class SmolVLMPromptBuilder:
    """Prompts as ids (see :class:`~v2l_fast.vlm.base.PromptBuilder`).

    It needs no weights, so data workers build prompts without a model.
    """

    tokenizer: PreTrainedTokenizerBase
    tile_size: int
    tokens_per_view: int

    @cached_property
    def _prompt_tokenizer(self) -> PromptTokenizer:
        return PromptTokenizer(self.tokenizer)

    def ids(self, template: str) -> list[int]:
        """Token ids of trusted text, in which spelled-out special tokens are special tokens."""
        return self._prompt_tokenizer.encode(template)

    def question(self, question: Question) -> list[int]:
        """A question or conversation without a video; the model's answer follows."""
        return self._prompt_tokenizer.encode(*chat_pieces(question, "", True))

    def answer(self, text: str, finished: bool = True) -> list[int]:
        """The model's turn; ends with the stop token if ``finished``."""
        return self._prompt_tokenizer.encode(" ", text, END_OF_UTTERANCE if finished else "")

    def video_prompt(
        self,
        timestamps: Sequence[float],
        duration: float,
        rows: int,
        cols: int,
        question: Question,
        answer_follows: bool,
    ) -> list[int]:
        """A user's turn of video and text, with one image token per feature of each view.

        In a conversation, the video is in the user's first turn.
        """
        video = video_text(len(timestamps), timestamps, duration, rows, cols, self.tokens_per_view)
        return self._prompt_tokenizer.encode(*chat_pieces(question, video, answer_follows))

    def question_suffix(self, text: str) -> list[int]:
        """The part of a video prompt after the video's last special token, with an answer to
        follow. Tokenizers split at special tokens, so the ids equal those in the whole prompt."""
        return self._prompt_tokenizer.encode(AFTER_VIDEO, text, turn_end(True))

    def text_prefix(self) -> list[int]:
        """The ids that every :meth:`question` starts with."""
        return self.ids(TURN_START.rstrip())

    def text_prefix_with_video(
        self, timestamps: Sequence[float], duration: float, rows: int, cols: int
    ) -> list[int]:
        """Replaces :meth:`text_prefix` where the video is in context."""
        ids = self.video_prompt(timestamps, duration, rows, cols, "", answer_follows=False)
        return ids[: -len(self.ids(turn_end(False)))]


# --- the model ------------------------------------------------------------------------------------


class SmolVLM:
    """A frozen SmolVLM2 (see :class:`~v2l_fast.vlm.base.Backbone`).

    Args:
        model: ``SmolVLMForConditionalGeneration`` with its weights; it is frozen and set to eval.
        tokenizer: its tokenizer.
        name_or_path: where it came from, for provenance.
    """

    preprocessing = f"smolvlm-{PREPROCESSING_VERSION}"

    def __init__(
        self,
        model: SmolVLMForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        name_or_path: str,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name_or_path = name_or_path
        self.decoder = Decoder(model.model.text_model, model.lm_head)
        vision: Any = model.config.vision_config
        self.tile_size = vision.image_size
        side = vision.image_size // vision.patch_size
        self.tokens_per_view = side**2 // model.config.scale_factor**2
        self.prompt_builder = SmolVLMPromptBuilder(tokenizer, self.tile_size, self.tokens_per_view)
        on_cpu = self.decoder.device.type == "cpu"
        affordable = max(1, PATCHES_CPU // side**2) if on_cpu else VIEWS_PER_CHUNK
        self.views_per_unit = min(VIEWS_PER_CHUNK, affordable)
        self.image_token_id = model.config.image_token_id
        self.stop_ids = _stop_ids(model, tokenizer)
        self._patch_positions = _patch_positions(side).to(self.decoder.device)
        self._encode_pixels = SmolVLM.encode_pixels

    def compile(self, backend: str = "inductor") -> None:
        """Compile vision tower, connector and decoder layers; see :meth:`Decoder.compile`."""
        self._encode_pixels = compiled(SmolVLM.encode_pixels, backend)
        self.decoder.compile(backend)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> SmolVLM:
        """Load model and tokenizer with transformers.

        Raises:
            CheckpointError: weights or tokenizer are missing, broken or incomplete.
        """
        shows = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            loaded: Any = SmolVLMForConditionalGeneration.from_pretrained(
                name_or_path, dtype=dtype, output_loading_info=True
            )
            model, info = loaded
            tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        except Exception as error:
            # transformers raises a dozen unrelated types for a broken folder.
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise CheckpointError(f"{name_or_path}: cannot load the model ({reason})") from error
        finally:
            if shows:
                transformers_logging.enable_progress_bar()
        missing = sorted(info["missing_keys"])
        if missing:
            raise CheckpointError(
                f"{name_or_path}: the weights lack {missing[0]} and {len(missing) - 1} more; "
                "is this the whole model?"
            )
        return cls(model.to(device), tokenizer, str(name_or_path))

    @property
    def hidden_size(self) -> int:
        return self.decoder.config.hidden_size

    def linear(self, layer: int, module: str) -> torch.nn.Linear:
        """A decoder layer's linear layer by its name, e.g. ``down_proj``.

        Raises:
            CheckpointError: the decoder has no such layer.
        """
        owner = self.decoder.layers[layer]
        for part in (owner.mlp, owner.self_attn):
            linear = getattr(part, module, None)
            if isinstance(linear, torch.nn.Linear):
                return linear
        raise CheckpointError(f"{self.name_or_path}: the decoder has no linear layer {module!r}")

    # --- prompts --------------------------------------------------------------------------------

    def question(self, question: Question) -> Prompt:
        """A question or conversation without a video; the model's answer follows."""
        return self.prompt(self.prompt_builder.question(question))

    def video_prompt(
        self, chunk: VideoChunk, question: Question, answer_follows: bool = True
    ) -> Prompt:
        """Encoded video and text: the direct baseline's question or, if no answer follows, the pass
        whose hidden states become an adapter."""
        ids = self.prompt_builder.video_prompt(*chunk.layout, question, answer_follows)
        return self.prompt(ids, chunk)

    def video_prefix(self, chunk: VideoChunk) -> Prompt:
        """The part of :meth:`video_prompt` that all questions share, to the video's last special
        token."""
        ids = self.prompt_builder.video_prompt(*chunk.layout, "", False)
        fake = cast(int, self.tokenizer.convert_tokens_to_ids(FAKE_TOKEN))
        last = ids[::-1].index(fake)
        return self.prompt(ids[: len(ids) - last], chunk)

    def question_suffix(self, text: str) -> Prompt:
        """The part of :meth:`video_prompt` after :meth:`video_prefix`; an answer follows."""
        return self.prompt(self.prompt_builder.question_suffix(text))

    def prompt(self, ids: Sequence[int], chunk: VideoChunk | None = None) -> Prompt:
        """Token ids, with the features of an encoded video in place of its image tokens."""
        tensor = torch.tensor(ids, dtype=torch.long)
        if chunk is None:
            return Prompt(self.embed(tensor), ids=tuple(ids))
        visual = tensor == self.image_token_id
        embeddings = self.embed(tensor, [chunk.visual])
        visual_mask = send(visual, self.decoder.device)
        return Prompt(embeddings, int(visual.sum()), visual_mask, tuple(ids))

    def decode(self, ids: list[int], strip: bool = True) -> str:
        """Ids of an answer -> text without special tokens and, with ``strip``, outer spaces."""
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return text.strip() if strip else text

    # --- tensors --------------------------------------------------------------------------------

    def encode(self, clip: Clip, longest_edge: int) -> VideoChunk:
        """Vision tower and connector, once for any number of prompts."""
        return run_to_completion(self.iter_encode(clip, longest_edge))

    def iter_encode(self, clip: Clip, longest_edge: int) -> Generator[WorkUnit, None, VideoChunk]:
        """:meth:`encode` in units: resizing where the frames are, then chunks of views."""
        chunk = yield from iter_views(clip, longest_edge, self.tile_size)
        features: list[Tensor] = []
        for views in chunk.visual.split(self.views_per_unit):
            yield "encode frames", len(features) * self.views_per_unit, len(chunk.visual)
            features.append(self.encode_views(views))
        return replace(chunk, visual=torch.cat(features))

    @torch.no_grad()
    def encode_views(self, views: Tensor) -> Tensor:
        """Vision tower and connector over uint8 views [V, 3, M, M], in bounded chunks.

        Returns:
            [V, tokens_per_view, D]. A view's result does not depend on the other views.
        """
        features = [
            self._encode_pixels(self, normalize(chunk.to(self.decoder.device), self.decoder.dtype))
            for chunk in views.split(self.views_per_unit)
        ]
        return torch.cat(features)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Normalized pixels [V, 3, M, M] -> [V, tokens_per_view, D]."""
        tower = self.model.model.vision_model
        # Also tells the compiler that only the number of views varies: with every size symbolic,
        # compilation takes three times as long.
        side = tower.embeddings.image_size
        if (pixels.shape[1], pixels.shape[2], pixels.shape[3]) != (3, side, side):
            raise ValueError(f"views must be [V, 3, {side}, {side}], got {list(pixels.shape)}")
        # The tower's own forward waits for the device to find out that all patches are visible, and
        # some versions of it compute the positions in bfloat16, which is too coarse.
        embeddings = tower.embeddings
        hidden = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        hidden = hidden + embeddings.position_embedding(self._patch_positions)
        hidden = tower.encoder(inputs_embeds=hidden).last_hidden_state
        return self.model.model.connector(tower.post_layernorm(hidden))

    @torch.no_grad()
    def embed(self, ids: Tensor, features: Sequence[Tensor] = ()) -> Tensor:
        """Token ids [..., S] -> embeddings [..., S, D], with the visual features [V, t, D] in
        place of the image tokens, in order. Does not wait for the device if ids are on the CPU.

        Raises:
            ConfigError: there are features, but not one for each image token.
        """
        device = self.decoder.device
        embeddings = self.decoder.embed(send(ids, device))
        if not features:
            return embeddings
        rows = torch.cat([f.flatten(0, 1) for f in features])
        # Counted on the CPU, where ids come from: asking the device would wait for it.
        index = np.flatnonzero(ids.cpu().numpy() == self.image_token_id)
        if len(index) != len(rows):
            raise ConfigError(
                f"{len(index)} image tokens in the prompts for {len(rows)} visual features: were "
                f"both made for {self.name_or_path}, and does its tokenizer know {IMAGE_TOKEN} as "
                f"id {self.image_token_id}?"
            )
        flat = embeddings.view(-1, embeddings.shape[-1])
        flat.index_copy_(
            0, send(torch.from_numpy(index), device), rows.to(device, embeddings.dtype)
        )
        return embeddings


def _patch_positions(side: int) -> Tensor:
    """Position of each patch of a full square view [side²], as transformers 4.51.3 computes it."""
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    # Its step is a float32 number, which matters for some sides.
    fractions = torch.arange(0, 1 - 1e-6, float(np.float32(1 / side)))
    row = torch.bucketize(fractions, boundaries, right=True)
    return (row[:, None] * side + row).flatten()


def _stop_ids(
    model: SmolVLMForConditionalGeneration, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Ids that end an answer, from the generation config and the tokenizer."""
    ids: set[int] = set()
    for eos in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        ids.update([eos] if isinstance(eos, int) else eos or [])
    return tuple(sorted(ids))
