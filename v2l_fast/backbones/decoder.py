"""Llama-family text decoder, run layer by layer with explicit adapters and cache.

The weights are transformers' own modules; this file owns the order of operations, because three
things must be explicit that transformers' forward hides: the input of every layer (the
hypernetwork's features), the adapters of every example, and a static cache whose rows are at
positions of their own. No hooks, no patched forwards, no state between calls.

Sequences are right-padded. Under a causal mask no token sees what follows it, so padding needs no
mask, and a row's next token overwrites the padding behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from v2l_fast.adapted import AdapterSlots


@dataclass
class Cache:
    """Static key/value cache: keys and values [L, E, kv heads, capacity, head_dim]."""

    keys: Tensor
    values: Tensor

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]


@dataclass(frozen=True)
class Span:
    """Where the tokens of a forward pass stand.

    Attributes:
        positions: [E, T] int64 position of each token in its sequence.
        mask: [E, 1, T, K] bool over the first K cache slots (without a cache: over the pass's own
            tokens), or None for plain causal attention among the pass's own tokens.
        rope: cos and sin [E, T, head_dim].
    """

    positions: Tensor
    mask: Tensor | None
    rope: tuple[Tensor, Tensor]


class Decoder:
    """Functional view of a Llama-family decoder and its LM head.

    Args:
        text_model: module with ``embed_tokens``, ``layers``, ``norm`` and ``rotary_emb``.
        lm_head: hidden states to logits.
    """

    def __init__(self, text_model: nn.Module, lm_head: nn.Module) -> None:
        self.text_model = text_model
        self.lm_head = lm_head
        self.config = text_model.config
        self.num_layers = len(text_model.layers)

    @property
    def device(self) -> torch.device:
        return self.text_model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.text_model.embed_tokens.weight.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [...] -> embeddings [..., D]."""
        return self.text_model.embed_tokens(ids)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """Empty cache for ``batch`` rows of up to ``capacity`` tokens."""
        heads, size = self.config.num_key_value_heads, self._head_dim()
        shape = (self.num_layers, batch, heads, capacity, size)
        # Zeros, not empty: masked slots are read with weight 0, and 0 * NaN is NaN.
        return Cache(
            torch.zeros(shape, dtype=self.dtype, device=self.device),
            torch.zeros(shape, dtype=self.dtype, device=self.device),
        )

    def span(self, positions: Tensor, mask: Tensor | None) -> Span:
        """A pass over tokens at any ``positions`` [E, T] under any ``mask``."""
        return Span(positions, mask, self._rope(positions))

    def prefill_span(self, batch: int, length: int) -> Span:
        """Positions 0 to ``length`` - 1 of every row, causal."""
        return self.span(torch.arange(length, device=self.device).expand(batch, length), None)

    def step_span(self, positions: Tensor, limit: int) -> Span:
        """One token a row at ``positions`` [E], all below ``limit``; sees slots up to its own."""
        slots = torch.arange(limit, device=self.device)
        mask = (slots <= positions[:, None])[:, None, None, :]
        return self.span(positions[:, None], mask)

    def layer(
        self,
        index: int,
        hidden: Tensor,
        span: Span,
        cache: Cache | None = None,
        adapters: AdapterSlots | None = None,
    ) -> Tensor:
        """One decoder layer: [E, T, D] -> [E, T, D]; writes keys and values into ``cache``."""
        return self.run_layer(self.text_model.layers[index], index, hidden, span, cache, adapters)

    def run_layer(
        self,
        layer: nn.Module,
        index: int,
        hidden: Tensor,
        span: Span,
        cache: Cache | None = None,
        adapters: AdapterSlots | None = None,
    ) -> Tensor:
        """:meth:`layer` with the layer's module given: compiled, it is one graph for all layers."""
        attention, mlp = layer.self_attn, layer.mlp

        def linear(name: str, module: nn.Linear, x: Tensor) -> Tensor:
            if adapters is None or name not in adapters.A:
                return module(x)
            return adapters.apply(name, index, module, x)

        x = layer.input_layernorm(hidden)
        heads = (*x.shape[:2], -1, self._head_dim())
        query, key, value = (
            linear(name, getattr(attention, name), x).view(heads).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        query, key = apply_rotary_pos_emb(query, key, *span.rope)
        if cache is not None:
            key, value = _write(cache, index, span, key, value)
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=span.mask,
            is_causal=span.mask is None,
            scale=attention.scaling,
            # A comparison of shapes is symbolic to the compiler and no bool.
            enable_gqa=attention.num_key_value_groups != 1,
        )
        mixed = mixed.transpose(1, 2).reshape(*x.shape[:2], -1)
        hidden = hidden + linear("o_proj", attention.o_proj, mixed)
        x = layer.post_attention_layernorm(hidden)
        gate = mlp.act_fn(linear("gate_proj", mlp.gate_proj, x))
        up = linear("up_proj", mlp.up_proj, x)
        return hidden + linear("down_proj", mlp.down_proj, gate * up)

    def layer_inputs(self, embeddings: Tensor) -> Iterator[Tensor]:
        """What enters layers 0 to L - 1, one after the other: L tensors [E, T, D].

        Layer L - 1 itself is never computed, nor the LM head.
        """
        span = self.prefill_span(*embeddings.shape[:2])
        hidden = embeddings
        for index in range(self.num_layers):
            yield hidden
            if index + 1 < self.num_layers:
                hidden = self.layer(index, hidden, span)

    def forward(
        self,
        embeddings: Tensor,
        span: Span | None = None,
        cache: Cache | None = None,
        adapters: AdapterSlots | None = None,
    ) -> Tensor:
        """All layers and the final norm: [E, T, D] -> [E, T, D]; see :meth:`logits`."""
        span = span or self.prefill_span(*embeddings.shape[:2])
        hidden = embeddings
        for index in range(self.num_layers):
            hidden = self.layer(index, hidden, span, cache, adapters)
        return self.text_model.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Normed hidden states [..., D] -> logits [..., vocabulary], float32 or wider."""
        logits = self.lm_head(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _head_dim(self) -> int:
        size = getattr(self.config, "head_dim", None)
        return size or self.config.hidden_size // self.config.num_attention_heads

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return self.text_model.rotary_emb(like, positions)


def _write(
    cache: Cache, layer: int, span: Span, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """Store the pass's keys and values; return what the pass attends to."""
    keys, values = cache.keys.select(0, layer), cache.values.select(0, layer)
    if span.mask is None:
        length = key.shape[2]
        keys[:, :, :length], values[:, :, :length] = key, value
        return key, value
    rows = torch.arange(key.shape[0], device=key.device)
    keys[rows, :, span.positions[:, 0]] = key[:, :, 0]
    values[rows, :, span.positions[:, 0]] = value[:, :, 0]
    limit = span.mask.shape[-1]
    return keys[:, :, :limit], values[:, :, :limit]
