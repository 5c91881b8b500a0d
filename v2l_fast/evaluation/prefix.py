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
from v2l_fast.generation import GenerationOutput, ModelRunner, Request, SamplingParams
from v2l_fast.hypernet.adapter_bank import AdapterBank
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
    """Runs one request behind a prefix whose layers hold different numbers of tokens."""

    def __init__(self, decoder: Decoder, prefix: CachedPrefix, stop_ids: Sequence[int]) -> None:
        super().__init__(decoder, 1, prefix.cache.capacity, stop_ids, prefix.cache)
        self._prefix = prefix
        # Tokens behind the prefix.
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
        for index, kept in enumerate(prefix.lengths):
            hidden = self.decoder.layer(index, hidden, metadata[kept], prefix.cache)
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
        metadata[length] = AttentionMetadata(slots[None], visible[None, None], rope)
    return metadata
