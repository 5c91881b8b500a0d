"""SmolVLM2: prompts, vision embedding and decoder of the family the paper trains on.

Models, weights and tokenizer are transformers' own. Preprocessing and prompt text are ours and
fixed to transformers 4.51.3 at batch size 1 (as the released `infer.py` runs):
later processors sample, resize and word prompts differently, silently.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, SmolVLMForConditionalGeneration
from transformers.utils import logging as transformers_logging

from v2l_fast.compiling import compiled
from v2l_fast.errors import CheckpointError
from v2l_fast.video import Clip
from v2l_fast.video.preprocess import PREPROCESSING_VERSION, normalize
from v2l_fast.vlm.base import EncodedVideo, Prompt, iter_resize
from v2l_fast.vlm.decoder import Decoder
from v2l_fast.vlm.smolvlm_inputs import SmolVLMPromptBuilder
from v2l_fast.vlm.smolvlm_prompt import FAKE_TOKEN, IMAGE_TOKEN
from v2l_fast.work_units import WorkUnit, run_to_completion

# Views in one vision call at most: 64 of 1,024 patches hold activations under 2 GB.
VIEWS_PER_CHUNK = 64
# Patches in one vision call on a CPU, a few seconds of SmolVLM2-500M's tower.
PATCHES_CPU = 4096


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
        vision = model.config.vision_config
        self.tile_size = vision.image_size
        side = vision.image_size // vision.patch_size
        self.tokens_per_view = side**2 // model.config.scale_factor**2
        self.prompt_builder = SmolVLMPromptBuilder(tokenizer, self.tile_size, self.tokens_per_view)
        on_cpu = self.decoder.device.type == "cpu"
        affordable = max(1, PATCHES_CPU // side**2) if on_cpu else VIEWS_PER_CHUNK
        self.views_per_unit = min(VIEWS_PER_CHUNK, affordable)
        self.image_token_id = model.config.image_token_id
        self.stop_ids = _stop_ids(model, tokenizer)
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
            model, info = SmolVLMForConditionalGeneration.from_pretrained(
                name_or_path, dtype=dtype, output_loading_info=True
            )
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
        owner = self.decoder.text_model.layers[layer]
        for part in (owner.mlp, owner.self_attn):
            linear = getattr(part, module, None)
            if isinstance(linear, torch.nn.Linear):
                return linear
        raise CheckpointError(f"{self.name_or_path}: the decoder has no linear layer {module!r}")

    # --- prompts --------------------------------------------------------------------------------

    def question(self, text: str) -> Prompt:
        """A question without a video; the model's answer follows."""
        return self.embed(self._tensor(self.prompt_builder.question(text)))

    def question_about(self, clip: Clip, text: str, longest_edge: int) -> Prompt:
        """A question with the video in context: the direct baseline."""
        return self.video_prompt(self.encode(clip, longest_edge), text)

    def context(self, clip: Clip, instruction: str, longest_edge: int) -> Prompt:
        """The pass whose hidden states become the adapter: video and instruction, no answer."""
        return self.video_prompt(self.encode(clip, longest_edge), instruction, answer_follows=False)

    def encode(self, clip: Clip, longest_edge: int) -> EncodedVideo:
        """Vision tower and connector, once for any number of prompts."""
        return run_to_completion(self.iter_encode(clip, longest_edge))

    def iter_encode(self, clip: Clip, longest_edge: int) -> Generator[WorkUnit, None, EncodedVideo]:
        """:meth:`encode` in units: resizing where the frames are, then bounded chunks of views."""
        views = yield from iter_resize(clip.frames, longest_edge, self.tile_size)
        features = []
        for chunk in views.views.split(self.views_per_unit):
            yield "encode frames", len(features) * self.views_per_unit, len(views.views)
            features.append(self.encode_views(chunk))
        return EncodedVideo(
            torch.cat(features), clip.timestamps, clip.duration, views.rows, views.cols
        )

    def video_prompt(
        self,
        video: EncodedVideo,
        text: str,
        answer_follows: bool = True,
        ids: Sequence[int] | None = None,
    ) -> Prompt:
        """:meth:`question_about` of an encoded video: :meth:`video_prefix`, then
        :meth:`question_suffix`; or, where no answer follows, :meth:`context`. ``ids``: those of
        ``prompt_builder.video_prompt``, if they are known."""
        known = self._ids_about(video, text, answer_follows) if ids is None else self._tensor(ids)
        return self.embed(known, video.features)

    def video_prefix(self, video: EncodedVideo) -> Prompt:
        """What all questions about a video begin with, to the video's last special token."""
        ids = self._ids_about(video, "", False)
        last = (ids == self.tokenizer.convert_tokens_to_ids(FAKE_TOKEN)).nonzero()[-1]
        return self.embed(ids[: last + 1], video.features)

    def question_suffix(self, text: str) -> Prompt:
        """The rest of the prompt: the question; the model's answer follows."""
        return self.embed(self._tensor(self.prompt_builder.question_suffix(text)))

    def _ids_about(self, video: EncodedVideo, text: str, answer_follows: bool) -> Tensor:
        clip = video.timestamps, video.duration, video.rows, video.cols
        return self._tensor(self.prompt_builder.video_prompt(*clip, text, answer_follows))

    # --- tensors --------------------------------------------------------------------------------

    def tokenize(self, text: str) -> Tensor:
        """Text with special tokens spelled out -> ids [T] on the model's device."""
        return self._tensor(self.prompt_builder.ids(text))

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self.decoder.device)

    def decode(self, ids: list[int], strip: bool = True) -> str:
        """Ids of an answer -> text without special tokens and, with ``strip``, outer spaces."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip() if strip else text

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
        # Also tells the compiler that views vary in number alone: with every size a symbol it
        # takes three times as long.
        side = tower.embeddings.image_size
        if (pixels.shape[1], pixels.shape[2], pixels.shape[3]) != (3, side, side):
            raise ValueError(f"views must be [V, 3, {side}, {side}], not {list(pixels.shape)}")
        hidden = tower(pixel_values=pixels).last_hidden_state
        return self.model.model.connector(hidden)

    @torch.no_grad()
    def embed(self, ids: Tensor, features: Tensor | None = None) -> Prompt:
        """Token ids [T] and vision features [V, t, D] of their image tokens -> prompt.

        Raises:
            CheckpointError: the tokenizer did not produce one id for each image token.
        """
        embeddings = self.decoder.embed(ids)
        if features is None:
            return Prompt(embeddings, 0)
        places = ids == self.image_token_id
        rows = features.reshape(-1, features.shape[-1])
        if int(places.sum()) != len(rows):
            raise CheckpointError(
                f"{self.name_or_path}: {int(places.sum())} image tokens for {len(rows)} features; "
                f"does the tokenizer know {IMAGE_TOKEN} as id {self.image_token_id}?"
            )
        embeddings[places] = rows.to(embeddings.dtype)
        return Prompt(embeddings, len(rows), places)


def _stop_ids(
    model: SmolVLMForConditionalGeneration, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Ids that end an answer: the generation config's and the tokenizer's own."""
    ids: set[int] = set()
    for eos in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        ids.update([eos] if isinstance(eos, int) else eos or [])
    return tuple(sorted(ids))
