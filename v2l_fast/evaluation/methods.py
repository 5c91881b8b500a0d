"""Methods of answering many questions about one video, each split into preparation and questions.

A method prepares a video once and stores the result; every question pays for the rest. All methods
use the same frames, prompts, greedy decoding and eager decoder, one question at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from v2l_fast.evaluation.prefix import (
    FrameFusion,
    Reduction,
    continue_greedily,
    prefill,
    reduced_layers,
    reduced_prefix,
)
from v2l_fast.generation import SamplingParams, generate
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.hypernet.adapter_bank import AdapterBank
from v2l_fast.model import Video, Video2LoRA
from v2l_fast.video import Clip, FrameSampling
from v2l_fast.vlm import Prompt
from v2l_fast.vlm.base import VideoChunk
from v2l_fast.vlm.decoder import Decoder

# Cache slots reserved for a question.
_QUESTION_ROOM = 512


@dataclass(frozen=True)
class MethodSettings:
    """Settings that all methods share.

    Attributes:
        sampling: frames and size.
        max_new_tokens: maximum length of an answer.
        fusion: settings of FrameFusion.
    """

    model: Video2LoRA
    sampling: FrameSampling
    max_new_tokens: int = 128
    fusion: FrameFusion = FrameFusion()

    def clip(self, video: Video) -> Clip:
        """The frames that all methods use."""
        return self.model.load_clip(video, self.sampling)

    def encode(self, video: Video) -> VideoChunk:
        """Decode, resize and run the vision tower."""
        return self.model.backbone.encode(self.clip(video), self.sampling.longest_edge)


@dataclass(frozen=True)
class PreparedVideo:
    """What a method stores of a video, its size in bytes, and the visual tokens it removed."""

    stored: Any
    bytes: int
    reduction: Reduction | None = None


@dataclass(frozen=True)
class MethodAnswer:
    """Token ids of an answer, seconds from the question's text to the first token, and the visual
    tokens removed for this question."""

    tokens: list[int]
    time_to_first_token: float
    reduction: Reduction | None = None


@dataclass(frozen=True)
class Method:
    """A named method: ``prepare`` a video once, then ``ask`` about it."""

    name: str
    prepare: Callable[[MethodSettings, Video], PreparedVideo]
    ask: Callable[[MethodSettings, PreparedVideo, str], MethodAnswer]


def _answer(
    setting: MethodSettings,
    make_prompt: Callable[[], Prompt],
    adapters: AdapterBank | None = None,
    decoder: Decoder | None = None,
) -> MethodAnswer:
    start = time.perf_counter()
    prompt = make_prompt()
    seconds = time.perf_counter() - start
    backbone = setting.model.backbone
    limit = SamplingParams(max_new_tokens=setting.max_new_tokens)
    generated = generate(
        decoder or backbone.decoder, [prompt.embeddings], backbone.stop_ids, limit, adapters
    )
    return MethodAnswer(generated.tokens[0], seconds + generated.time_to_first_token)


# --- the video in context -----------------------------------------------------------------------


def _store_nothing(setting: MethodSettings, video: Video) -> PreparedVideo:
    return PreparedVideo(video, 0)


def _ask_video(setting: MethodSettings, prepared: PreparedVideo, question: str) -> MethodAnswer:
    backbone = setting.model.backbone
    return _answer(
        setting, lambda: backbone.video_prompt(setting.encode(prepared.stored), question)
    )


def _store_features(setting: MethodSettings, video: Video) -> PreparedVideo:
    encoded = setting.encode(video)
    return PreparedVideo(encoded, _size(encoded.visual))


def _ask_features(setting: MethodSettings, prepared: PreparedVideo, question: str) -> MethodAnswer:
    return _answer(setting, lambda: setting.model.backbone.video_prompt(prepared.stored, question))


def _store_cache(setting: MethodSettings, video: Video) -> PreparedVideo:
    backbone = setting.model.backbone
    opening = backbone.video_prefix(setting.encode(video))
    prefix = prefill(backbone.decoder, opening.embeddings, setting.max_new_tokens + _QUESTION_ROOM)
    return PreparedVideo(prefix, prefix.bytes)


def _store_fused_cache(setting: MethodSettings, video: Video) -> PreparedVideo:
    backbone = setting.model.backbone
    encoded = setting.encode(video)
    opening, frames = backbone.video_prefix(encoded), len(encoded.timestamps)
    reduction = Reduction()
    prefix, _ = reduced_prefix(
        backbone.decoder,
        opening,
        frames,
        setting.fusion,
        setting.max_new_tokens + _QUESTION_ROOM,
        reduction,
    )
    return PreparedVideo(prefix, prefix.bytes, reduction)


@torch.inference_mode()
def _ask_fused(setting: MethodSettings, prepared: PreparedVideo, question: str) -> MethodAnswer:
    """FrameFusion as its authors use it: every question reduces the tokens again and steers the
    pruning."""
    start = time.perf_counter()
    backbone, encoded = setting.model.backbone, setting.encode(prepared.stored)
    prompt, decoder = backbone.video_prompt(encoded, question), backbone.decoder
    reduction = Reduction()
    prefix, last = reduced_prefix(
        decoder,
        prompt,
        len(encoded.timestamps),
        setting.fusion,
        setting.max_new_tokens,
        reduction,
    )
    first = decoder.logits(decoder.text_model.norm(last)).argmax(-1)
    token = int(first)
    wait = time.perf_counter() - start
    tokens = [] if token in backbone.stop_ids else [token]
    if tokens and setting.max_new_tokens > 1:
        rest = continue_greedily(
            decoder, prefix, decoder.embed(first), backbone.stop_ids, setting.max_new_tokens - 1
        )
        tokens += rest.tokens[0]
    return MethodAnswer(tokens, wait, reduction)


def _ask_cache(setting: MethodSettings, prepared: PreparedVideo, question: str) -> MethodAnswer:
    start = time.perf_counter()
    backbone = setting.model.backbone
    rest = backbone.question_suffix(question).embeddings
    seconds = time.perf_counter() - start
    generated = continue_greedily(
        backbone.decoder, prepared.stored, rest, backbone.stop_ids, setting.max_new_tokens
    )
    return MethodAnswer(generated.tokens[0], seconds + generated.time_to_first_token)


# --- adapters -----------------------------------------------------------------------------------


def internalize(setting: MethodSettings, video: Video) -> Adapter:
    """The adapter of ``Video2LoRA.internalize``."""
    return setting.model.internalize(video, sampling=setting.sampling)


@torch.inference_mode()
def internalize_fused(
    setting: MethodSettings, video: Video, reduction: Reduction | None = None
) -> Adapter:
    """The adapter generated from a context whose visual tokens FrameFusion reduces."""
    model, clip = setting.model, setting.clip(video)
    chunk = model.backbone.encode(clip, setting.sampling.longest_edge)
    prompt = model.backbone.video_prompt(chunk, model.config.instruction, answer_follows=False)
    layers = reduced_layers(
        model.backbone.decoder, prompt, len(clip.frames), setting.fusion, reduction=reduction
    )
    factors = [model.hypernet.layer(index, hidden) for index, hidden in enumerate(layers)]
    return model.hypernet.assemble(factors)[0]


def _store_adapter(setting: MethodSettings, video: Video) -> PreparedVideo:
    return _store_packed(setting, internalize(setting, video))


def _store_fused_adapter(setting: MethodSettings, video: Video) -> PreparedVideo:
    reduction = Reduction()
    return _store_packed(setting, internalize_fused(setting, video, reduction), reduction)


def _store_packed(
    setting: MethodSettings, adapter: Adapter, reduction: Reduction | None = None
) -> PreparedVideo:
    decoder = setting.model.backbone.decoder
    bank = AdapterBank.pack([adapter], decoder.device, decoder.dtype)
    return PreparedVideo(bank, _adapter_size(adapter), reduction)


def _store_merged(setting: MethodSettings, video: Video) -> PreparedVideo:
    model = setting.model
    decoder = model.backbone.decoder.merged(internalize(setting, video))
    weights = (
        model.backbone.linear(layer, module).weight
        for module in model.config.target_modules
        for layer in range(model.config.num_layers)
    )
    return PreparedVideo(decoder, sum(_size(weight) for weight in weights))


def _ask_adapter(setting: MethodSettings, prepared: PreparedVideo, question: str) -> MethodAnswer:
    return _answer(setting, lambda: setting.model.backbone.question(question), prepared.stored)


def _ask_merged(setting: MethodSettings, prepared: PreparedVideo, question: str) -> MethodAnswer:
    backbone = setting.model.backbone
    return _answer(setting, lambda: backbone.question(question), decoder=prepared.stored)


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _adapter_size(adapter: Adapter) -> int:
    """Bytes of the generated factors; the bias adapter belongs to the model."""
    return sum(_size(t) for factors in (adapter.A, adapter.B) for t in factors.values())


DIRECT = Method("direct", _store_nothing, _ask_video)
ADAPTER = Method("adapter", _store_adapter, _ask_adapter)
METHODS = (
    DIRECT,
    Method("vision-feature cache", _store_features, _ask_features),
    Method("KV-cache reuse", _store_cache, _ask_cache),
    Method("FrameFusion (ours)", _store_nothing, _ask_fused),
    Method("FrameFusion (ours) + KV-cache reuse", _store_fused_cache, _ask_cache),
    Method("FrameFusion (ours) + adapter", _store_fused_adapter, _ask_adapter),
    ADAPTER,
    Method("merged adapter", _store_merged, _ask_merged),
)
