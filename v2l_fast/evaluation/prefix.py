"""KV-cache reuse: a prompt's prefix as keys and values, and answers that continue it.

Layers may hold different numbers of tokens (token reduction removes some between layers), at their
rotary positions in the whole prompt. A question is written after them and overwritten by the next
one; nothing is copied.
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
    needed = max(prefix.lengths) + len(embeddings) + max_new_tokens
    if needed > prefix.cache.capacity:
        raise ConfigError(
            f"the question and {max_new_tokens} new tokens need {needed} cache slots, but the "
            f"prefix has {prefix.cache.capacity}; prefill with more room"
        )
    tokens: list[int] = []
    count, first_seconds = 0, 0.0
    pending = embeddings[None]
    while len(tokens) < max_new_tokens:
        hidden = pending
        metadata = _layer_metadata(decoder, prefix, count, pending.shape[1])
        for index in range(decoder.num_layers):
            hidden = decoder.layer(index, hidden, metadata[prefix.lengths[index]], prefix.cache)
        logits = decoder.logits(decoder.text_model.norm(hidden[:, -1]))
        chosen = logits.argmax(-1)
        token = int(chosen)
        if not count:
            first_seconds = time.perf_counter() - start
        if token in stop_ids:
            break
        tokens.append(token)
        count += pending.shape[1]
        pending = decoder.embed(chosen[:, None])
    return GenerationOutput([tokens], first_seconds)


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
        metadata[length] = AttentionMetadata(slots[None], visible[None, None], rope)
    return metadata
