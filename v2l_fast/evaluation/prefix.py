"""A prompt's beginning kept as keys and values, and answers that continue behind it.

Layers may keep different numbers of tokens (token reduction drops some on the way), at the rotary
positions they had in the whole prompt. What comes after is written behind them and overwritten by
the next question: nothing is copied.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from v2l_fast.errors import ConfigError
from v2l_fast.generation import GenerationOutput
from v2l_fast.vlm.decoder import AttentionMetadata, Decoder, StaticKVCache


@dataclass(frozen=True)
class CachedPrefix:
    """A filled cache of one sequence.

    Attributes:
        cache: batch 1; slots behind a layer's ``lengths`` are free.
        lengths: tokens each layer keeps.
        position: rotary position of the token that comes next.
    """

    cache: StaticKVCache
    lengths: tuple[int, ...]
    position: int

    @property
    def bytes(self) -> int:
        """Size of the keys and values that must be stored."""
        _, _, heads, _, size = self.cache.keys.shape
        return 2 * sum(self.lengths) * heads * size * self.cache.keys.element_size()


@torch.inference_mode()
def prefill(decoder: Decoder, embeddings: Tensor, room: int) -> CachedPrefix:
    """Keys and values of a prompt's beginning [T, D], with ``room`` for tokens behind it."""
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
    """Answer a prompt whose beginning is ``prefix`` and whose rest is ``embeddings`` [T, D].

    Raises:
        ConfigError: the prefix has no room for the rest and the answer.
    """
    start = time.perf_counter()
    needed = max(prefix.lengths) + len(embeddings) + max_new_tokens
    if needed > prefix.cache.capacity:
        raise ConfigError(
            f"the question and {max_new_tokens} new tokens need {needed} cache slots, there are "
            f"{prefix.cache.capacity}: prefill with more room"
        )
    tokens: list[int] = []
    behind, first = 0, 0.0
    pending = embeddings[None]
    while len(tokens) < max_new_tokens:
        hidden = pending
        metadata = _layer_metadata(decoder, prefix, behind, pending.shape[1])
        for index in range(decoder.num_layers):
            hidden = decoder.layer(index, hidden, metadata[prefix.lengths[index]], prefix.cache)
        logits = decoder.logits(decoder.text_model.norm(hidden[:, -1]))
        chosen = logits.argmax(-1)
        token = int(chosen)
        if not behind:
            first = time.perf_counter() - start
        if token in stop_ids:
            break
        tokens.append(token)
        behind += pending.shape[1]
        pending = decoder.embed(chosen[:, None])
    return GenerationOutput([tokens], first)


def _layer_metadata(
    decoder: Decoder, prefix: CachedPrefix, behind: int, count: int
) -> dict[int, AttentionMetadata]:
    """For each number of kept tokens: where ``count`` more stand, ``behind`` tokens after them."""
    steps = behind + torch.arange(count, device=decoder.device)
    rope = decoder.attention_metadata((prefix.position + steps)[None], None).rope
    metadata = {}
    for length in set(prefix.lengths):
        slots = length + steps
        visible = torch.arange(length + behind + count, device=decoder.device) <= slots[:, None]
        metadata[length] = AttentionMetadata(slots[None], visible[None, None], rope)
    return metadata
