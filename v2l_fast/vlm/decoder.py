"""Llama-family text decoder, run layer by layer with explicit adapters and cache.

The weights are transformers' own modules. This file owns the order of operations, because it needs
three things that transformers' forward hides: the input of every layer (the hypernetwork's
features), an adapter per example, and a static cache whose rows are at different positions. No
hooks, no patched forwards, no state between calls.

Sequences are right-padded. Under a causal mask no token attends to a later one, so padding needs no
mask, and a row's next token overwrites the padding after it.
"""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaModel,
    apply_rotary_pos_emb,
)

from csrc_triton import dispatch
from v2l_fast.device import compiled
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.hypernet.adapter_bank import AdapterBank
from v2l_fast.work_units import causal_token_chunks


@dataclass(frozen=True)
class AttentionMetadata:
    """Positions and visibility of the tokens of a forward pass.

    Attributes:
        positions: [E, T] int64 position of each token in its sequence.
        mask: [E, 1, G T, K] bool over the first K cache slots (without a cache: over the pass's own
            tokens), a row for each of the T tokens, G times, where G query heads share a key head;
            or None for causal attention among the pass's own tokens.
        rope: cos and sin [E, T, head_dim].
        lengths: of a one-token step, [E] int32: the number of leading cache slots that ``mask``
            makes visible.
    """

    positions: Tensor
    mask: Tensor | None
    rope: tuple[Tensor, Tensor]
    lengths: Tensor | None = None


@dataclass(frozen=True)
class KVCacheLayer:
    """One layer's part of a :class:`StaticKVCache`: keys and values
    [rows, kv heads, capacity, head_dim].

    A compiled layer takes this, not the whole cache: if it sliced the full cache itself,
    functionalization would copy the whole cache back.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor | None = None
    flash: bool = False

    def append(self, metadata: AttentionMetadata, key: Tensor, value: Tensor) -> None:
        """Store the keys and values [E, kv heads, T, head_dim] of a pass."""
        count, length = key.shape[0], key.shape[2]
        rows = torch.arange(count, device=key.device) if self.rows is None else self.rows
        if metadata.mask is None:
            self.keys[rows, :, :length], self.values[rows, :, :length] = key, value
        else:
            self.keys[rows[:, None], :, metadata.positions] = key.transpose(1, 2)
            self.values[rows[:, None], :, metadata.positions] = value.transpose(1, 2)

    def gather(self, count: int, limit: int) -> tuple[Tensor, Tensor]:
        """Keys and values [E, kv heads, limit, head_dim] of the ``count`` rows of a pass."""
        rows = slice(0, count) if self.rows is None else self.rows
        return self.keys[rows, :, :limit], self.values[rows, :, :limit]


@dataclass
class StaticKVCache:
    """Preallocated keys and values [L, rows, kv heads, capacity, head_dim].

    Attributes:
        rows: [E] int64, the cache row of each example of a pass; None for the first E rows.
        flash: one-token steps attend to the cache with FlashAttention 2.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor | None = None
    flash: bool = False

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def layer(self, index: int) -> KVCacheLayer:
        return KVCacheLayer(self.keys[index], self.values[index], self.rows, self.flash)


class Decoder:
    """A Llama-family decoder and its LM head as functions of their inputs.

    Args:
        text_model: module with ``embed_tokens``, ``layers``, ``norm`` and ``rotary_emb``.
        lm_head: hidden states to logits.
    """

    def __init__(self, text_model: LlamaModel, lm_head: nn.Linear) -> None:
        self.text_model = text_model
        self.lm_head = lm_head
        self.config = text_model.config
        self.num_layers = len(text_model.layers)
        self._run_layer = Decoder.run_layer

    @property
    def layers(self) -> Sequence[LlamaDecoderLayer]:
        """The layers' modules."""
        return cast(Sequence[LlamaDecoderLayer], self.text_model.layers)

    @property
    def is_compiled(self) -> bool:
        """Whether layers run through a compiled graph."""
        return self._run_layer is not Decoder.run_layer

    def compile(self, backend: str = "inductor") -> None:
        """Run every layer through one compiled graph, for all lengths.

        The first call of each kind (prefill, decoding, with adapters, ...) then takes seconds.
        """
        self._run_layer = compiled(Decoder.run_layer, backend)

    def merged(self, adapter: Adapter) -> Decoder:
        """A decoder with one adapter merged into its weights, W + s·BᵀA; all else is shared.

        The sum is rounded to the weights' dtype once. Answering costs the same as with the plain
        model.
        """
        shared = [*self.text_model.parameters(), *self.text_model.buffers()]
        twin = Decoder(copy.deepcopy(self.text_model, {id(t): t for t in shared}), self.lm_head)
        twin._run_layer = self._run_layer
        a, b = adapter.merged()
        for index, layer in enumerate(twin.layers):
            for name in a:
                linear = getattr(layer.mlp, name, None) or getattr(layer.self_attn, name)
                weight = linear.weight
                wide = torch.promote_types(weight.dtype, torch.float32)
                left, right = (side[name][index].to(weight.device, wide) for side in (b, a))
                total = weight.to(wide) + adapter.scale * (left.mT @ right)
                merged = total.to(weight.dtype).detach()
                linear.weight = nn.Parameter(merged, requires_grad=False)
        return twin

    @property
    def device(self) -> torch.device:
        return self.text_model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.text_model.embed_tokens.weight.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [...] -> embeddings [..., D]."""
        return self.text_model.embed_tokens(ids)

    def new_cache(self, batch: int, capacity: int) -> StaticKVCache:
        """Empty cache for ``batch`` rows of up to ``capacity`` tokens."""
        shape = (self.num_layers, *self._cache_shape(batch, capacity))
        # Zeros, not empty: attention reads masked slots with weight 0, and 0 * NaN is NaN.
        keys, values = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        return StaticKVCache(keys, values, flash=flash_usable(keys))

    def attention_metadata(self, positions: Tensor, mask: Tensor | None) -> AttentionMetadata:
        """For tokens at any ``positions`` [E, T] under any ``mask`` [E, 1, T, K]."""
        if mask is not None:
            # Here, not in the layers: the repeated mask of several tokens is a copy.
            groups = self.layers[0].self_attn.num_key_value_groups
            mask = mask.expand(-1, groups, -1, -1).flatten(1, 2).unsqueeze(1)
        return AttentionMetadata(positions, mask, self._rope(positions))

    def prefill_metadata(self, batch: int, length: int) -> AttentionMetadata:
        """Positions 0 to ``length`` - 1 of every row, causal."""
        positions = torch.arange(length, device=self.device).expand(batch, length)
        return self.attention_metadata(positions, None)

    def decode_metadata(self, positions: Tensor, limit: int) -> AttentionMetadata:
        """For one token per row at ``positions`` [E] below ``limit``; sees slots up to its own."""
        slots = torch.arange(limit, device=self.device)
        mask = (slots <= positions[:, None])[:, None, None, :]
        lengths = (positions + 1).to(torch.int32)
        return replace(self.attention_metadata(positions[:, None], mask), lengths=lengths)

    def layer(
        self,
        index: int,
        hidden: Tensor,
        metadata: AttentionMetadata,
        cache: StaticKVCache | None = None,
        adapters: AdapterBank | None = None,
    ) -> Tensor:
        """One decoder layer: [E, T, D] -> [E, T, D]; writes keys and values into ``cache``."""
        module = self.layers[index]
        own = None if cache is None else cache.layer(index)
        return self._run_layer(self, module, index, hidden, metadata, own, adapters)

    def run_layer(
        self,
        layer: LlamaDecoderLayer,
        index: int,
        hidden: Tensor,
        metadata: AttentionMetadata,
        cache: KVCacheLayer | None = None,
        adapters: AdapterBank | None = None,
    ) -> Tensor:
        """:meth:`layer` with the module as an argument, so that one graph serves all layers."""
        hidden = hidden + self.attention_block(layer, index, hidden, metadata, cache, adapters)
        return hidden + self.mlp_block(layer, index, hidden, adapters)

    def attention_block(
        self,
        layer: LlamaDecoderLayer,
        index: int,
        hidden: Tensor,
        metadata: AttentionMetadata,
        cache: KVCacheLayer | None = None,
        adapters: AdapterBank | None = None,
    ) -> Tensor:
        """A layer's attention, to be added to the residual stream: [E, T, D] -> [E, T, D]."""
        attention = layer.self_attn
        query, key, value = self.project_qkv(layer, index, hidden, metadata, adapters)
        if cache is not None:
            cache.append(metadata, key, value)
        if cache is not None and cache.flash and metadata.lengths is not None:
            rows = None if cache.rows is None else cache.rows.to(torch.int32)
            mixed = flash_decode(
                query, cache.keys, cache.values, metadata.lengths, rows, attention.scaling
            )
        else:
            if cache is not None and metadata.mask is not None:
                key, value = cache.gather(len(key), metadata.mask.shape[-1])
            # The module's attribute; comparing shapes would give the compiler a symbol, not a bool.
            groups = attention.num_key_value_groups
            mixed = _attend(query, key, value, metadata.mask, attention.scaling, groups)
        mixed = mixed.transpose(1, 2).reshape(*hidden.shape[:2], -1)
        return _linear("o_proj", attention.o_proj, index, mixed, adapters)

    def project_qkv(
        self,
        layer: LlamaDecoderLayer,
        index: int,
        hidden: Tensor,
        metadata: AttentionMetadata,
        adapters: AdapterBank | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [E, heads, T, head_dim] (rotated), keys (rotated) and values
        [E, kv heads, T, head_dim] of a layer's attention."""
        x = layer.input_layernorm(hidden)
        # The module's attribute is a constant to the compiler; the config's would be a symbol.
        shape = (*x.shape[:2], -1, layer.self_attn.head_dim)
        query, key, value = (
            _linear(name, getattr(layer.self_attn, name), index, x, adapters)
            .view(shape)
            .transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        return *apply_rotary_pos_emb(query, key, *metadata.rope), value

    def mlp_block(
        self,
        layer: LlamaDecoderLayer,
        index: int,
        hidden: Tensor,
        adapters: AdapterBank | None = None,
    ) -> Tensor:
        """A layer's MLP, to be added to the residual stream: [E, T, D] -> [E, T, D]."""
        mlp = layer.mlp
        x = layer.post_attention_layernorm(hidden)
        gate = mlp.act_fn(_linear("gate_proj", mlp.gate_proj, index, x, adapters))
        up = _linear("up_proj", mlp.up_proj, index, x, adapters)
        return _linear("down_proj", mlp.down_proj, index, gate * up, adapters)

    def layer_inputs(self, embeddings: Tensor) -> Iterator[Tensor]:
        """The inputs of layers 0 to L - 1, one after the other: L tensors [E, T, D].

        Neither layer L - 1 nor the LM head is computed.
        """
        metadata = self.prefill_metadata(*embeddings.shape[:2])
        hidden = embeddings
        for index in range(self.num_layers):
            yield hidden
            if index + 1 < self.num_layers:
                hidden = self.layer(index, hidden, metadata)

    def iter_layer(self, index: int, hidden: Tensor, unit: int) -> Generator[None, None, Tensor]:
        """:meth:`layer` over whole sequences [E, T, D] in chunks of at most ``unit`` tokens;
        yields between chunks.

        A chunk attends to earlier ones through their keys and values, so the result is the same
        up to rounding, and exactly the same for a single chunk.
        """
        count, length = hidden.shape[:2]
        parts = list(causal_token_chunks(length, unit))
        if len(parts) == 1:
            return self.layer(index, hidden, self.prefill_metadata(count, length))
        shape = self._cache_shape(count, length)
        cache = KVCacheLayer(hidden.new_empty(shape), hidden.new_empty(shape))
        module = self.layers[index]
        result = torch.empty_like(hidden)
        for part in parts:
            if part.start:
                yield
            positions = torch.arange(part.start, part.stop, device=self.device)
            mask = torch.arange(part.stop, device=self.device) <= positions[:, None]
            metadata = self.attention_metadata(
                positions.expand(count, -1), mask.expand(count, 1, -1, -1)
            )
            result[:, part] = self._run_layer(
                self, module, index, hidden[:, part], metadata, cache, None
            )
        return result

    def forward(
        self,
        embeddings: Tensor,
        metadata: AttentionMetadata | None = None,
        cache: StaticKVCache | None = None,
        adapters: AdapterBank | None = None,
    ) -> Tensor:
        """All layers and the final norm: [E, T, D] -> [E, T, D]; see :meth:`logits`."""
        metadata = metadata or self.prefill_metadata(*embeddings.shape[:2])
        hidden = embeddings
        for index in range(self.num_layers):
            hidden = self.layer(index, hidden, metadata, cache, adapters)
        return self.text_model.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Normed hidden states [..., D] -> logits [..., vocabulary], float32 or wider."""
        logits = self.lm_head(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _cache_shape(self, rows: int, capacity: int) -> tuple[int, int, int, int]:
        """[rows, kv heads, capacity, head_dim] of a layer's keys, and of its values."""
        config = self.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return rows, config.num_key_value_heads or config.num_attention_heads, capacity, size

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return self.text_model.rotary_emb(like, positions)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, groups: int
) -> Tensor:
    """Attention [E, heads, T, head_dim] of ``groups`` query heads to each key and value head,
    under the mask of :class:`AttentionMetadata`, or causal.

    Under a mask, PyTorch's fused attention on a GPU does not know grouped heads: it would take the
    unfused form and repeat keys and values. The queries of a group see the same slots, so they
    become rows of one head.
    """
    if mask is None:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=groups != 1
        )
    if groups == 1:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    count, _, length, size = query.shape
    rows = query.reshape(count, -1, groups * length, size)
    mixed = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    return mixed.reshape(query.shape)


def _linear(
    name: str, module: nn.Linear, index: int, x: Tensor, adapters: AdapterBank | None
) -> Tensor:
    """A linear layer with the adapter of each example that has one."""
    if adapters is None or name not in adapters.A:
        return module(x)
    return adapters.apply(name, index, module, x)


# --- FlashAttention 2 --------------------------------------------------------------------------
#
# For one-token steps over the static cache, where the package is installed. Passes without a mask
# (causal, right-padded) already run in a kernel of the same class inside PyTorch. The rows of a
# step differ in length: SDPA needs a mask, reads every row up to the longest one, and gathers the
# rows of the cache first. FlashAttention takes the cache, its rows and their lengths.
# ``V2L_BACKEND=reference`` keeps to SDPA.


def flash_usable(cache: Tensor) -> bool:
    """Whether steps over this cache [..., capacity, head_dim] go to FlashAttention 2.

    It takes float16 and bfloat16 on Ampere and later GPUs, heads of up to 256 in steps of 8.
    """
    return (
        cache.device.type == "cuda"
        and cache.dtype in (torch.float16, torch.bfloat16)
        and cache.shape[-1] <= 256
        and cache.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(cache.device) >= (8, 0)
        and dispatch.requested_backend() != "reference"
        and _installed()
    )


def _installed() -> bool:
    # The distribution tells; flash-attn-4 has the same import name and cannot do this on sm_80.
    try:
        return importlib.metadata.version("flash-attn").startswith("2.")
    except importlib.metadata.PackageNotFoundError:
        return False


@torch.library.custom_op("v2l_fast::flash_decode", mutates_args=())
def flash_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention of one query token a row over what its cache row holds.

    Args:
        query: [E, heads, 1, head_dim], rotated.
        keys, values: [rows, kv heads, capacity, head_dim], the step's own already written.
        lengths: [E] int32, tokens of each row to attend to, from 1.
        rows: [E] int32, each query's row of the cache; None: the first E.
        scale: of the products.

    Returns:
        [E, heads, 1, head_dim].
    """
    from flash_attn import flash_attn_with_kvcache

    mixed = flash_attn_with_kvcache(
        query.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        cache_seqlens=lengths,
        cache_batch_idx=rows,
        softmax_scale=scale,
    )
    return mixed.transpose(1, 2).contiguous()


@flash_decode.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)
