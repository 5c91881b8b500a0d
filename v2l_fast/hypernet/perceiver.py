"""Perceiver resamplers of the hypernetwork: latents that cross-attend to a context.

Weights and parameter names are those of the released checkpoints; the attention is computed in the
absorbed form (see ``csrc_triton/perceiver_attention.py``).

Precision: latents are few and live in float32 over half-precision features. Over float32 features
latents and attention are float64 while gradients are recorded, unless the caller declines: it keeps
gradients within 1e-5 of the released code's on badly conditioned networks, where float32 throughout
is off by 1.2e-5, as far as the released code itself is from float64. The training step declines, as
float64 costs a third of the hypernetwork's time. Adapters alone are within 2e-6 in float32.
``V2L_BACKEND=triton`` trains in float32 throughout: the kernels have no float64.
On a CPU, inference over half-precision features computes the modality projection in half precision
and everything after it in float32: the projection has most of the FLOPs, and half precision
behind it would add to the error and save little.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from csrc_triton import dispatch, gated_projection, perceiver_attention
from csrc_triton.perceiver_attention.reference import visible_bounds

RMS_EPS = 1e-6

Chunks = Sequence[slice]
# Times are encoded as sin/cos at 1, 2, 4, ... 32 half-periods over the video.
NUM_FREQUENCIES = 6


def latent_dtype(features: torch.dtype, widen: bool = True) -> torch.dtype:
    """Where latents, their norms and their residual stream live.

    widen: use float64 over float32 features while gradients are recorded.
    """
    if features.itemsize < 4:
        return torch.float32
    wider = widen and torch.is_grad_enabled() and dispatch.requested_backend() != "triton"
    return torch.float64 if wider else features


def attention_dtype(features: torch.dtype, latents: torch.dtype) -> torch.dtype:
    """Of the attention and the head: tensor cores for half precision, else that of the latents."""
    return features if features.itemsize < 4 else latents


def latents_features_dtype(features: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that everything behind the modality projection treats as that of the features."""
    on_cpu = device.type == "cpu" and features.itemsize < 4 and not torch.is_grad_enabled()
    return torch.float32 if on_cpu else features


def inverse_rms(x: Tensor, visible: Tensor | None = None) -> Tensor:
    """1 / sqrt(mean(x²) + eps) over the last axis, 0 where not visible: [..., D] -> [...]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inv = torch.rsqrt(wide.square().mean(-1) + RMS_EPS)
    return inv if visible is None else inv * visible


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ in x's dtype, whatever dtype the weight is kept in."""
    return F.linear(x, weight.to(x.dtype))


class RMSNorm(nn.Module):
    """RMS norm over the last axis, eps 1e-6, of latents in float32 or wider."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * inverse_rms(x)[..., None] * self.weight.to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, size: int, hidden: int, output: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, hidden, bias=False)
        self.up_proj = nn.Linear(size, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, output, bias=False)

    def forward(self, x: Tensor, visible: Tensor | None = None, keep: bool = True) -> Tensor:
        """[..., size] -> [..., output]; rows that are not visible are read as zeros.

        keep: save the gate and up products for the backward pass.
        """
        gate, up = self.gate_proj.weight.to(x.dtype), self.up_proj.weight.to(x.dtype)
        return gated_projection(x, visible, gate, up, self.down_proj.weight.to(x.dtype), keep)


class PerceiverAttention(nn.Module):
    """Grouped-query attention of latents to [context ; latents], or to the latents alone.

    The normed latents are appended to the context as keys and values; they are never masked.
    """

    def __init__(self, size: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.q_proj = nn.Linear(size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(size, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(size, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, size, bias=False)

    def forward(
        self,
        latents: Tensor,
        compute: torch.dtype,
        norm_weight: Tensor | None = None,
        context: Tensor | None = None,
        inv_rms: Tensor | None = None,
        bounds: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            latents: [N, Q, Z] normed; N = 1 when they do not depend on the example yet.
            compute: dtype of the products, and of the context.
            norm_weight: [Z] weight of this layer's context norm.
            context: [N', S, Z] raw context, or None for self-attention among the latents.
            inv_rms: [N', S] 1 / rms, 0 where masked.
            bounds: [N', 2] ``visible_bounds(inv_rms)``.

        Returns:
            [max(N, N'), Q, Z] of latents' dtype.
        """
        absorbed, scores = self._absorbed(latents, compute)
        if context is None or inv_rms is None or norm_weight is None:
            return self._values(torch.softmax(scores, dim=-1) @ latents, latents, compute)
        folded = self._folded(absorbed, norm_weight, compute, len(context))
        seen = perceiver_attention(folded, context, inv_rms, bounds)
        return self._values(self._joined(latents, scores, seen, norm_weight), latents, compute)

    def iter_forward(
        self,
        latents: Tensor,
        compute: torch.dtype,
        norm_weight: Tensor,
        context: Tensor,
        inv_rms: Tensor,
        bounds: Tensor,
        chunks: Chunks,
    ) -> Generator[None, None, Tensor]:
        """:meth:`forward` over a context in chunks of tokens; yields before each."""
        absorbed, scores = self._absorbed(latents, compute)
        folded = self._folded(absorbed, norm_weight, compute, len(context))
        seen: tuple[Tensor, Tensor] | None = None
        for chunk in chunks:
            yield
            tokens = context[:, chunk].contiguous()
            inside = (bounds - chunk.start).clamp(0, tokens.shape[1])
            out, lse = perceiver_attention(folded, tokens, inv_rms[:, chunk].contiguous(), inside)
            part = out.to(lse.dtype), lse
            seen = part if seen is None else _merge_attention(seen, part)
        assert seen is not None, "a context has at least one chunk"
        return self._values(self._joined(latents, scores, seen, norm_weight), latents, compute)

    def _absorbed(self, latents: Tensor, compute: torch.dtype) -> tuple[Tensor, Tensor]:
        """Queries with the key projection folded in [N, P, Z], P = heads x Q, and their scores
        [N, P, Q] of the latents."""
        wide = latents.dtype
        n, count, size = latents.shape
        groups = self.num_kv_heads
        query = linear(latents.to(compute), self.q_proj.weight)
        query = query.view(n, count, groups, -1, self.head_dim)
        key_weight = self.k_proj.weight.to(compute).view(groups, self.head_dim, size)
        # Rows are (kv group, head in group, latent): the absorbed query W_kᵀ q of every head.
        absorbed = torch.einsum("nqghd,gdz->nghqz", query, key_weight)
        absorbed = absorbed.reshape(n, self.num_heads * count, size).to(wide)
        absorbed = absorbed / math.sqrt(self.head_dim)
        return absorbed, absorbed @ latents.mT

    def _folded(
        self, absorbed: Tensor, norm_weight: Tensor, compute: torch.dtype, count: int
    ) -> Tensor:
        """The queries as :func:`perceiver_attention` takes them, for ``count`` contexts."""
        folded = (absorbed * norm_weight.to(absorbed.dtype)).to(compute)
        return folded.expand(count, -1, -1)

    def _joined(
        self,
        latents: Tensor,
        scores: Tensor,
        seen: tuple[Tensor, Tensor],
        norm_weight: Tensor,
    ) -> Tensor:
        """What the queries take from the context and from the latents: [N, P, Z]."""
        wide = latents.dtype
        mixed, seen_lse = seen[0], seen[1].to(wide)
        lse = torch.logaddexp(seen_lse, torch.logsumexp(scores, dim=-1))
        seen_share = torch.exp(seen_lse - lse)[..., None]
        own = torch.exp(scores - lse[..., None]) @ latents
        return seen_share * (mixed.to(wide) * norm_weight.to(wide)) + own

    def _values(self, mixed: Tensor, latents: Tensor, compute: torch.dtype) -> Tensor:
        """Value and output projection: [N, P, Z] -> [N, Q, Z]."""
        wide = latents.dtype
        _, count, size = latents.shape
        groups = self.num_kv_heads
        mixed = mixed.to(compute).view(mixed.shape[0], groups, -1, count, size)
        value_weight = self.v_proj.weight.to(compute).view(groups, self.head_dim, size)
        values = torch.einsum("nghqz,gdz->nqghd", mixed, value_weight)
        return linear(values.reshape(mixed.shape[0], count, -1), self.o_proj.weight).to(wide)


def _merge_attention(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Attention to two parts of a context, each output with its log-sum-exp, as one."""
    total = torch.logaddexp(first[1], second[1])
    # All of them are -inf for a row that has seen no token yet.
    base = total.masked_fill(total == -torch.inf, 0.0)
    shares = [torch.exp(lse - base)[..., None] for _, lse in (first, second)]
    return first[0] * shares[0] + second[0] * shares[1], total


class PerceiverLayer(nn.Module):
    """Attention and SwiGLU, each with a norm before and after, each with a residual."""

    def __init__(
        self, size: int, num_heads: int, num_kv_heads: int, head_dim: int, cross: bool
    ) -> None:
        super().__init__()
        self.input_latents_layernorm = RMSNorm(size)
        self.input_context_layernorm = RMSNorm(size) if cross else None
        self.self_attn = PerceiverAttention(size, num_heads, num_kv_heads, head_dim)
        self.post_attention_layernorm = RMSNorm(size)
        self.pre_ff_layernorm = RMSNorm(size)
        self.post_ff_layernorm = RMSNorm(size)
        self.mlp = SwiGLU(size, 4 * size, size)

    def forward(
        self,
        latents: Tensor,
        context: Tensor,
        inv_rms: Tensor,
        bounds: Tensor,
        mlp_dtype: torch.dtype,
    ) -> Tensor:
        """[N or 1, Q, Z] latents, [N, S, Z] context, [N, S] inverse rms and their bounds [N, 2]
        -> [N, Q, Z]."""
        normed = self.input_latents_layernorm(latents)
        if self.input_context_layernorm is None:
            attended = self.self_attn(normed, context.dtype)
        else:
            norm_weight = self.input_context_layernorm.weight
            attended = self.self_attn(normed, context.dtype, norm_weight, context, inv_rms, bounds)
        return self._residual(latents, attended, mlp_dtype)

    def iter_forward(
        self,
        latents: Tensor,
        context: Tensor,
        inv_rms: Tensor,
        bounds: Tensor,
        mlp_dtype: torch.dtype,
        chunks: Chunks,
    ) -> Generator[None, None, Tensor]:
        """:meth:`forward` over a context in chunks of tokens; yields before each."""
        if self.input_context_layernorm is None:
            return self(latents, context, inv_rms, bounds, mlp_dtype)
        normed = self.input_latents_layernorm(latents)
        norm_weight = self.input_context_layernorm.weight
        attended = yield from self.self_attn.iter_forward(
            normed, context.dtype, norm_weight, context, inv_rms, bounds, chunks
        )
        return self._residual(latents, attended, mlp_dtype)

    def _residual(self, latents: Tensor, attended: Tensor, mlp_dtype: torch.dtype) -> Tensor:
        latents = latents + self.post_attention_layernorm(attended)
        hidden = self.mlp(self.pre_ff_layernorm(latents).to(mlp_dtype))
        return latents + self.post_ff_layernorm(hidden.to(latents.dtype))


class Resampler(nn.Module):
    """Learned latents that read a context through a stack of :class:`PerceiverLayer`.

    With ``shared_weights`` every block after the second is the second, and the self-attention
    layers are those of the first block; the state dict lists them under every index.
    """

    def __init__(
        self,
        size: int,
        num_latents: int,
        num_blocks: int,
        num_self_attn_per_block: int,
        shared_weights: bool,
        heads: tuple[int, int, int],
    ) -> None:
        super().__init__()
        self.latents_q = nn.Parameter(torch.randn(num_latents, size))
        self.layers = nn.ModuleList()
        period = 1 + num_self_attn_per_block
        for index in range(num_blocks * period):
            block, offset = divmod(index, period)
            if shared_weights and offset == 0 and block >= 2:
                self.layers.append(self.layers[period])
            elif shared_weights and offset > 0 and block >= 1:
                self.layers.append(self.layers[offset])
            else:
                self.layers.append(PerceiverLayer(size, *heads, cross=offset == 0))
        self.layernorm = RMSNorm(size)

    def forward(
        self,
        context: Tensor,
        visible: Tensor | None,
        dtype: torch.dtype,
        wide: torch.dtype,
        shift: Tensor | None = None,
    ) -> Tensor:
        """[N, S, Z] finite context, [N, S] bool -> [N, Q, Z] latents.

        dtype, wide: of the features, and of the latents.
        shift: [N, Q, Z] to add to the learned latents. Without one, the first layer's queries are
        computed once for all examples.
        """
        inv_rms = inverse_rms(context, visible)
        # Once for all layers.
        context, bounds = context.to(attention_dtype(dtype, wide)), visible_bounds(inv_rms)
        latents = self._start(wide, shift)
        for layer in self.layers:
            latents = layer(latents, context, inv_rms, bounds, dtype)
        return self.layernorm(latents)

    def iter_forward(
        self,
        context: Tensor,
        inv_rms: Tensor,
        dtype: torch.dtype,
        shift: Tensor | None,
        chunks: Chunks,
    ) -> Generator[None, None, Tensor]:
        """:meth:`forward` over a context in chunks of tokens; yields before each.

        context: [N, S, Z] of the attention's dtype. inv_rms: [N, S], 0 where masked.
        """
        latents, bounds = self._start(latent_dtype(dtype), shift), visible_bounds(inv_rms)
        for layer in cast(Iterable[PerceiverLayer], self.layers):
            latents = yield from layer.iter_forward(
                latents, context, inv_rms, bounds, dtype, chunks
            )
        return self.layernorm(latents)

    def _start(self, wide: torch.dtype, shift: Tensor | None) -> Tensor:
        latents = self.latents_q.to(wide)[None]
        return latents if shift is None else latents + shift.to(latents.dtype)


class ChunkPositionEmbedding(nn.Module):
    """Embedding of a chunk's start and end in its video, added to the latents.

    It is initialized to zero, so adding it to a trained network changes nothing until it trains.
    """

    def __init__(self, encoder_latents: int, decoder_latents: int, size: int) -> None:
        super().__init__()
        waves = 2 * 2 * NUM_FREQUENCIES
        self.encoder = nn.Parameter(torch.zeros(waves, encoder_latents, size))
        self.decoder = nn.Parameter(torch.zeros(waves, decoder_latents, size))

    def forward(self, chunk_span: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 2] start and end, 0 to 1 -> [N, Q, Z] and [N, num_outputs, Z]."""
        octaves = torch.arange(NUM_FREQUENCIES, device=chunk_span.device)
        angles = math.pi * chunk_span[..., None] * 2**octaves
        waves = torch.cat([angles.sin(), angles.cos()], -1).flatten(1)
        encoder, decoder = (
            torch.einsum("nw,wqz->nqz", waves.to(weight.dtype), weight)
            for weight in (self.encoder, self.decoder)
        )
        return encoder, decoder


class Perceiver(nn.Module):
    """Modality projection, encoder and decoder: features of one layer slice to rank latents."""

    def __init__(
        self,
        input_size: int,
        size: int,
        encoder: tuple[int, int, int, bool],
        num_outputs: int,
        heads: tuple[int, int, int],
        chunk_position: bool = False,
    ) -> None:
        super().__init__()
        self.modality_projection = SwiGLU(input_size, 4 * input_size, size)
        self.encoder = Resampler(size, *encoder, heads)
        self.decoder = Resampler(size, num_outputs, 1, 0, False, heads)
        self.place = (
            ChunkPositionEmbedding(encoder[0], num_outputs, size) if chunk_position else None
        )

    def project(self, features: Tensor, visible: Tensor | None, keep: bool = False) -> Tensor:
        """[N, S, D] features -> [N, S, Z] context; ``keep`` as in :meth:`SwiGLU.forward`."""
        return self.modality_projection(features, visible, keep)

    def forward(
        self,
        context: Tensor,
        visible: Tensor | None,
        chunk_span: Tensor | None,
        wide: torch.dtype,
    ) -> Tensor:
        """[N, S, Z] context from :meth:`project`, [N, S] bool -> [N, num_outputs, Z].

        chunk_span: [N, 2] float32 start and end of the chunk as fractions of its video, read by a
            network with ``chunk_position``.
        wide: dtype of the latents and the result.
        """
        shifts = (None, None) if self.place is None else self.place(chunk_span)
        dtype = latents_features_dtype(context.dtype, context.device)
        encoded = self.encoder(context, visible, dtype, wide, shifts[0])
        return self.decoder(encoded, None, dtype, wide, shifts[1])

    def iter_forward(
        self, features: Tensor, visible: Tensor | None, chunk_span: Tensor | None, chunks: Chunks
    ) -> Generator[None, None, Tensor]:
        """:meth:`forward` over a context in chunks of tokens; yields before each but the first."""
        shifts = (None, None) if self.place is None else self.place(chunk_span)
        dtype = latents_features_dtype(features.dtype, features.device)
        wide = latent_dtype(dtype)
        contexts, inverses = [], []
        for chunk in chunks:
            if chunk.start:
                yield
            seen = None if visible is None else visible[:, chunk]
            projected = self.project(features[:, chunk], seen)
            inverses.append(inverse_rms(projected, seen))
            contexts.append(projected.to(attention_dtype(dtype, wide)))
        context, inv_rms = torch.cat(contexts, 1), torch.cat(inverses, 1)
        del contexts
        encoded = yield from self.encoder.iter_forward(context, inv_rms, dtype, shifts[0], chunks)
        return self.decoder(encoded, None, dtype, wide, shifts[1])
