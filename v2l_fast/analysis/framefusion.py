"""FrameFusion (Fu et al., ICCV 2025) for this decoder: our own implementation from the paper.

While the decoder's first layers run, visual tokens that are nearly the same as the token at the
same place of the previous frame are merged into it (mean); once a layer merges few, the least
attended visual tokens are pruned, once, down to the budget. Text is never touched and survivors
keep their rotary positions. Differences from the authors' code: the budget is a number of tokens
rather than of FLOPs, and the reduction sees the video alone, not a question, so that what is left
can be reused for every question.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from v2l_fast.analysis.prefix import Prefix
from v2l_fast.backbones import Prompt
from v2l_fast.backbones.decoder import Cache, Decoder, Span
from v2l_fast.errors import ConfigError

# Query rows of one block of attention weights.
_BLOCK = 512


@dataclass(frozen=True)
class FrameFusion:
    """Settings.

    Attributes:
        keep: share of the visual tokens to keep, above 0 and up to 1.
        similarity: least cosine similarity of tokens that merge.
        stop_ratio: merging ends at the first layer where less than this share of the visual tokens
            would merge.
    """

    keep: float = 0.25
    similarity: float = 0.6
    stop_ratio: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConfigError(f"keep must be above 0 and at most 1, not {self.keep}")


@dataclass(frozen=True)
class _Tokens:
    """Surviving tokens in order: hidden [n, D], rotary positions [n], place of each in its frame
    [n] (-1 for text)."""

    hidden: Tensor
    positions: Tensor
    places: Tensor

    @property
    def visual(self) -> Tensor:
        return self.places >= 0

    def kept(self, keep: Tensor) -> _Tokens:
        return _Tokens(self.hidden[keep], self.positions[keep], self.places[keep])


@torch.inference_mode()
def reduced_layers(
    decoder: Decoder,
    prompt: Prompt,
    frames: int,
    settings: FrameFusion,
    cache: Cache | None = None,
) -> Iterator[Tensor]:
    """What enters each layer, [1, n, D] with n falling; as ``Decoder.layer_inputs`` otherwise.

    Args:
        prompt: with a video of ``frames`` frames of equally many tokens.
        cache: with one, keys and values of survivors are written, and the last layer runs too.
    """
    visual = prompt.visual
    if visual is None or prompt.visual_tokens % frames:
        raise ConfigError(f"{prompt.visual_tokens} visual tokens are not {frames} equal frames")
    count = prompt.visual_tokens
    places = torch.full((len(prompt),), -1, device=decoder.device)
    places[visual] = torch.arange(count, device=decoder.device) % (count // frames)
    positions = torch.arange(len(prompt), device=decoder.device)
    tokens = _Tokens(prompt.embeddings, positions, places)
    budget = math.ceil(settings.keep * count)
    merging, received = True, None
    for index in range(decoder.num_layers):
        excess = count - budget
        if excess > 0 and received is not None:
            tokens = _prune(tokens, excess, received)
            count -= excess
        elif excess > 0 and merging:
            before = count
            tokens = _merge(tokens, excess, settings.similarity)
            count = int(tokens.visual.sum())
            merging = before - count >= settings.stop_ratio * before
        span = decoder.span(tokens.positions[None], None)
        hidden = tokens.hidden[None]
        yield hidden
        # Pruning looks at the attention of the layer before it.
        received = None if merging or count <= budget else _received(decoder, index, hidden, span)
        if index + 1 < decoder.num_layers or cache is not None:
            tokens = replace(tokens, hidden=decoder.layer(index, hidden, span, cache)[0])


def reduced_prefix(
    decoder: Decoder, prompt: Prompt, frames: int, settings: FrameFusion, room: int
) -> Prefix:
    """:func:`~v2l_fast.analysis.prefix.prefill` with token reduction on the way."""
    cache = decoder.new_cache(1, len(prompt) + room)
    layers = reduced_layers(decoder, prompt, frames, settings, cache)
    lengths = tuple(hidden.shape[1] for hidden in layers)
    return Prefix(cache, lengths, len(prompt))


def _merge(tokens: _Tokens, excess: int, least: float) -> _Tokens:
    """Merge up to ``excess`` visual tokens, the most similar first, into the one at their place in
    an earlier frame; a run of similar frames becomes one token, the mean of its tokens."""
    visual = tokens.visual.nonzero()[:, 0]
    # By place, then by time, so that neighbors are the same place in adjacent frames.
    order = visual[tokens.places[visual].argsort(stable=True)]
    rows, places = tokens.hidden[order].float(), tokens.places[order]
    alike = F.cosine_similarity(rows[1:], rows[:-1], dim=-1)
    alike = alike.masked_fill(places[1:] != places[:-1], -math.inf)
    joins = alike >= least
    if int(joins.sum()) > excess:
        joins = torch.zeros_like(joins)
        joins[alike.topk(excess).indices] = True
    starts = torch.cat([joins.new_ones(1), ~joins])
    group = starts.cumsum(0) - 1
    sums = rows.new_zeros(int(group[-1]) + 1, rows.shape[1]).index_add_(0, group, rows)
    means = sums / group.bincount()[:, None]
    hidden = tokens.hidden.clone()
    hidden[order[starts]] = means.to(hidden.dtype)
    keep = torch.ones_like(tokens.visual)
    keep[order[~starts]] = False
    return replace(tokens, hidden=hidden).kept(keep)


def _prune(tokens: _Tokens, excess: int, received: Tensor) -> _Tokens:
    """Drop the ``excess`` visual tokens that received least attention."""
    least = received.masked_fill(~tokens.visual, math.inf).topk(excess, largest=False).indices
    keep = torch.ones_like(tokens.visual)
    keep[least] = False
    return tokens.kept(keep)


def _received(decoder: Decoder, index: int, hidden: Tensor, span: Span) -> Tensor:
    """Attention each token receives in a layer, summed over queries, mean over heads: [n]."""
    layer = decoder.text_model.layers[index]
    query, key, _ = decoder.heads(layer, index, hidden, span)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    length = hidden.shape[1]
    received = torch.zeros(length, device=hidden.device)
    for start in range(0, length, _BLOCK):
        block = query[0, :, start : start + _BLOCK]
        scores = block @ key[0].mT * layer.self_attn.scaling
        keys = torch.arange(length, device=hidden.device)
        later = keys > keys[start : start + _BLOCK, None]
        weights = scores.float().masked_fill(later, -math.inf).softmax(-1)
        received += weights.sum(1).mean(0)
    return received
