"""Methods of answering many questions about one video, each split into preparation and questions.

A method prepares a video once and stores the result; every question pays for the rest. All methods
use the same frames, prompts, greedy decoding and eager decoder, one question at a time.

Baselines hold the video in the KV cache: a reused prompt prefix, and FrameFusion's reduction. A
prefix's layers may hold different numbers of tokens (token reduction removes some between layers),
at their rotary positions in the whole prompt. A question is written after them and overwritten by
the next one; nothing is copied.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from v2l_fast.errors import ConfigError
from v2l_fast.generation import GenerationOutput, ModelRunner, Request, SamplingParams, generate
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.hypernet.adapter_bank import AdapterBank
from v2l_fast.model import Video, Video2LoRA
from v2l_fast.video import Clip, FrameSampling
from v2l_fast.vlm import Prompt
from v2l_fast.vlm.base import VideoChunk
from v2l_fast.vlm.decoder import AttentionMetadata, Decoder, StaticKVCache

# --- prefixes in the KV cache ---------------------------------------------------------------------


@dataclass(frozen=True)
class CachedPrefix:
    """The prefilled cache of one sequence.

    Attributes:
        cache: batch size 1; slots from a layer's ``lengths`` on are free.
        lengths: number of tokens in each layer.
        position: rotary position of the next token.
    """

    cache: StaticKVCache
    lengths: tuple[int, ...]
    position: int

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values in use."""
        _, _, heads, _, size = self.cache.keys.shape
        return 2 * sum(self.lengths) * heads * size * self.cache.keys.element_size()


@torch.inference_mode()
def prefill(decoder: Decoder, embeddings: Tensor, room: int) -> CachedPrefix:
    """Run a prompt's prefix [T, D]; the cache has ``room`` for that many more tokens."""
    length = len(embeddings)
    cache = decoder.new_cache(1, length + room)
    decoder.forward(embeddings[None], cache=cache)
    return CachedPrefix(cache, (length,) * decoder.num_layers, length)


@torch.inference_mode()
def continue_greedily(
    decoder: Decoder,
    prefix: CachedPrefix,
    embeddings: Tensor,
    stop_ids: Sequence[int],
    max_new_tokens: int,
) -> GenerationOutput:
    """Answer greedily the prompt that continues ``prefix`` with ``embeddings`` [T, D].

    Raises:
        ConfigError: the cache has no room for the rest of the prompt and the answer.
    """
    start = time.perf_counter()
    slots = max(prefix.lengths) + len(embeddings) + max_new_tokens
    if slots > prefix.cache.capacity:
        raise ConfigError(
            f"the question and {max_new_tokens} new tokens need {slots} cache slots, but the "
            f"prefix has {prefix.cache.capacity}; prefill with more room"
        )
    request = Request(SamplingParams(max_new_tokens))
    runner = _PrefixRunner(decoder, prefix, stop_ids)
    runner.prefill([request], [embeddings])
    first_seconds = time.perf_counter() - start
    while request.finish_reason is None:
        runner.decode()
    if request.error is not None:
        raise request.error
    return GenerationOutput([request.tokens], first_seconds)


class _PrefixRunner(ModelRunner):
    """Runs one request after a prefix whose layers hold different numbers of tokens."""

    def __init__(self, decoder: Decoder, prefix: CachedPrefix, stop_ids: Sequence[int]) -> None:
        super().__init__(decoder, 1, prefix.cache.capacity, stop_ids, prefix.cache)
        self._prefix = prefix
        # Number of tokens after the prefix.
        self._count = 0

    def run_prefill(
        self, embeddings: Tensor, rows: Tensor, last: Tensor, adapters: AdapterBank | None
    ) -> Tensor:
        return self._run(embeddings)

    def run_decode(self, count: int, limit: int, adapters: AdapterBank | None) -> Tensor:
        return self._run(self.decoder.embed(self._tokens[:count, None]))

    def _run(self, hidden: Tensor) -> Tensor:
        prefix, length = self._prefix, hidden.shape[1]
        metadata = _layer_metadata(self.decoder, prefix, self._count, length)
        for index, count in enumerate(prefix.lengths):
            hidden = self.decoder.layer(index, hidden, metadata[count], prefix.cache)
        self._count += length
        return self.decoder.logits(self.decoder.text_model.norm(hidden[:, -1]))


def _layer_metadata(
    decoder: Decoder, prefix: CachedPrefix, offset: int, count: int
) -> dict[int, AttentionMetadata]:
    """Metadata of ``count`` tokens that follow the prefix after ``offset`` others, by the number of
    prefix tokens in a layer."""
    steps = offset + torch.arange(count, device=decoder.device)
    rope = decoder.attention_metadata((prefix.position + steps)[None], None).rope
    metadata = {}
    for length in set(prefix.lengths):
        slots = length + steps
        visible = torch.arange(length + offset + count, device=decoder.device) <= slots[:, None]
        own = decoder.attention_metadata(slots[None], visible[None, None])
        metadata[length] = replace(own, rope=rope)
    return metadata


# --- FrameFusion ----------------------------------------------------------------------------------
#
# FrameFusion (Fu et al., ICCV 2025) for this decoder: our own implementation of its rules.
#
# Before the first layer, and then between attention and MLP of every layer, a visual token that is
# nearly equal to the token at the same place in the previous frame is merged into it (mean). After
# the first pass that merges only a few tokens, the next pass prunes once, down to the budget: it
# removes the visual tokens that receive the least attention from the prompt's last token in that
# layer. Text is never removed, and the remaining tokens keep their rotary positions. This follows
# the authors' code except in two points: the budget is a number of tokens instead of FLOPs, and a
# prefix without a question can also be reduced, and then reused for every question; its last token
# takes the place of the prompt's.


@dataclass(frozen=True)
class FrameFusion:
    """Settings of the token reduction.

    Attributes:
        keep: share of the visual tokens to keep, above 0 and at most 1.
        similarity: minimum cosine similarity of tokens that merge.
        stop_ratio: merging ends with the first pass that merges less than this share of the visual
            tokens.
    """

    keep: float = 0.25
    similarity: float = 0.6
    stop_ratio: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConfigError(f"keep must be above 0 and at most 1, got {self.keep}")


@dataclass
class Reduction:
    """Numbers of visual tokens that were merged and pruned."""

    merged: int = 0
    pruned: int = 0


@dataclass(frozen=True)
class _Tokens:
    """The remaining tokens in order: hidden [n, D], rotary positions [n], place in the frame [n]
    (-1 for text)."""

    hidden: Tensor
    positions: Tensor
    places: Tensor

    @property
    def visual(self) -> Tensor:
        return self.places >= 0

    def select(self, keep: Tensor) -> _Tokens:
        return _Tokens(self.hidden[keep], self.positions[keep], self.places[keep])


@torch.inference_mode()
def reduced_layers(
    decoder: Decoder,
    prompt: Prompt,
    frames: int,
    settings: FrameFusion,
    cache: StaticKVCache | None = None,
    reduction: Reduction | None = None,
) -> Iterator[Tensor]:
    """The input of each layer, [1, n, D] with decreasing n; otherwise as ``Decoder.layer_inputs``.

    Args:
        prompt: contains a video of ``frames`` frames with equally many tokens each.
        cache: receives the keys and values of every layer; the last layer then runs as well, and
            its output is yielded last.
        reduction: its counts are increased.

    Raises:
        ConfigError: the visual tokens are not ``frames`` equal frames.
    """
    tokens = _Reducer(prompt, frames, settings, decoder.device, reduction or Reduction())
    tokens.reduce(None)
    for index in range(decoder.num_layers):
        hidden = tokens.hidden[None]
        yield hidden
        if index + 1 == decoder.num_layers and cache is None:
            return
        layer = decoder.layers[index]
        metadata = decoder.attention_metadata(tokens.positions[None], None)
        part = None if cache is None else cache.layer(index)
        attention = (
            _last_token_attention(decoder, index, hidden, metadata) if tokens.prunes_next else None
        )
        hidden = hidden + decoder.attention_block(layer, index, hidden, metadata, part)
        tokens.update(hidden[0])
        tokens.reduce(attention)
        hidden = tokens.hidden[None]
        tokens.update((hidden + decoder.mlp_block(layer, index, hidden))[0])
    yield tokens.hidden[None]


def reduced_prefix(
    decoder: Decoder,
    prompt: Prompt,
    frames: int,
    settings: FrameFusion,
    room: int,
    reduction: Reduction | None = None,
) -> tuple[CachedPrefix, Tensor]:
    """:func:`~v2l_fast.evaluation.methods.prefill` with token reduction.

    Returns:
        The prefix, and the last token's output of the last layer [1, D].
    """
    cache = decoder.new_cache(1, len(prompt) + room)
    *layers, last = reduced_layers(decoder, prompt, frames, settings, cache, reduction)
    lengths = tuple(hidden.shape[1] for hidden in layers)
    return CachedPrefix(cache, lengths, len(prompt)), last[:, -1]


class _Reducer:
    """The remaining tokens, and whether the next pass merges, prunes or does nothing."""

    def __init__(
        self,
        prompt: Prompt,
        frames: int,
        settings: FrameFusion,
        device: torch.device,
        reduction: Reduction,
    ) -> None:
        visual = prompt.visual
        if visual is None or prompt.visual_tokens % frames:
            raise ConfigError(
                f"{prompt.visual_tokens} visual tokens cannot be {frames} frames of equal size"
            )
        self.count = prompt.visual_tokens
        self.budget = math.ceil(settings.keep * self.count)
        self.settings, self.reduction, self.merging = settings, reduction, True
        places = torch.full((len(prompt),), -1, device=device)
        places[visual] = torch.arange(self.count, device=device) % (self.count // frames)
        positions = torch.arange(len(prompt), device=device)
        self.tokens = _Tokens(prompt.embeddings, positions, places)

    @property
    def hidden(self) -> Tensor:
        return self.tokens.hidden

    @property
    def positions(self) -> Tensor:
        return self.tokens.positions

    @property
    def prunes_next(self) -> bool:
        """Whether the next pass needs the attention of the last token."""
        return not self.merging and self.count > self.budget

    def update(self, hidden: Tensor) -> None:
        self.tokens = replace(self.tokens, hidden=hidden)

    def reduce(self, attention: Tensor | None) -> None:
        """One pass: prune by ``attention`` [n], or merge without it."""
        excess = self.count - self.budget
        if excess <= 0:
            return
        if attention is not None:
            self.tokens = _prune(self.tokens, excess, attention)
            self.reduction.pruned += excess
        else:
            self.tokens = _merge(self.tokens, excess, self.settings.similarity)
            merged = self.count - int(self.tokens.visual.sum())
            self.reduction.merged += merged
            self.merging = merged >= self.settings.stop_ratio * self.count
        self.count = int(self.tokens.visual.sum())


def _merge(tokens: _Tokens, excess: int, min_similarity: float) -> _Tokens:
    """Merge up to ``excess`` visual tokens, the most similar first, into the token at the same
    place of an earlier frame; a run of similar tokens becomes their mean."""
    visual = tokens.visual.nonzero()[:, 0]
    # Sorted by place, then time: neighbors are the same place in adjacent frames.
    order = visual[tokens.places[visual].argsort(stable=True)]
    rows, places = tokens.hidden[order].float(), tokens.places[order]
    similarity = F.cosine_similarity(rows[1:], rows[:-1], dim=-1)
    similarity = similarity.masked_fill(places[1:] != places[:-1], -math.inf)
    joins = similarity >= min_similarity
    if int(joins.sum()) > excess:
        joins = torch.zeros_like(joins)
        joins[similarity.topk(excess).indices] = True
    starts = torch.cat([joins.new_ones(1), ~joins])
    group = starts.cumsum(0) - 1
    sums = rows.new_zeros(int(group[-1]) + 1, rows.shape[1]).index_add_(0, group, rows)
    means = sums / group.bincount()[:, None]
    hidden = tokens.hidden.clone()
    hidden[order[starts]] = means.to(hidden.dtype)
    keep = torch.ones_like(tokens.visual)
    keep[order[~starts]] = False
    return replace(tokens, hidden=hidden).select(keep)


def _prune(tokens: _Tokens, excess: int, attention: Tensor) -> _Tokens:
    """Remove the ``excess`` visual tokens with the least attention."""
    least = attention.masked_fill(~tokens.visual, math.inf).topk(excess, largest=False).indices
    keep = torch.ones_like(tokens.visual)
    keep[least] = False
    return tokens.select(keep)


def _last_token_attention(
    decoder: Decoder, index: int, hidden: Tensor, metadata: AttentionMetadata
) -> Tensor:
    """Attention of the last token to each token in a layer, mean over heads: [n]."""
    layer = decoder.layers[index]
    query, key, _ = decoder.project_qkv(layer, index, hidden, metadata)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query[0, :, -1:] @ key[0].mT * layer.self_attn.scaling
    return scores.float().softmax(-1)[:, 0].mean(0)


# --- methods --------------------------------------------------------------------------------------

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
    return model.hypernet.adapters(factors)[0]


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
