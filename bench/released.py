"""The released op order in plain eager PyTorch: the tests' oracle and the benchmarks' baseline.

First the hypernetwork and its ops, then a training step (:class:`ReleasedStep`).

Concatenated context and latents, projected and repeated keys and values, a full score tensor, an
einsum head over all layers at once, adapters repeated for every question. Written from the
description of the released checkpoints, for the weights of a ``HyperNetwork``; independent of its
code and of ``csrc_triton``. Nothing is chunked, streamed or recomputed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from v2l_fast.data.readers import Sample
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.vlm.smolvlm import SmolVLM

RMS_EPS = 1e-6
IGNORED = -100

Weights = dict[str, Tensor]
Stage = Callable[[str], None]


def hypernetwork(
    network: HyperNetwork, features: Tensor, mask: Tensor | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A {module: [B, L, R, d_in]} and B {module: [B, L, R, d_out]}, all layers in one batch.

    Args:
        network: its weights and config.
        features: [B, L, S, D], of the weights' dtype.
        mask: [B, S], 1 where visible, or None. Masked features must be finite.
    """
    config = network.config
    weights = dict(network.named_parameters(remove_duplicate=False))
    batch, layers, tokens, _ = features.shape
    context = features.transpose(0, 1).reshape(layers * batch, tokens, -1)
    visible = None if mask is None else (mask == 1).repeat(layers, 1)
    heads = (config.num_heads, config.num_kv_heads, config.head_dim)

    perceiver = _inside(weights, "aggregator.perceiver")
    context = _swiglu(_inside(perceiver, "modality_projection"), context)
    period = 1 + config.num_self_attn_per_block
    cross = [place % period == 0 for place in range(config.num_blocks * period)]
    encoded = _resampler(_inside(perceiver, "encoder"), cross, heads, context, visible)
    latents = _resampler(_inside(perceiver, "decoder"), [True], heads, encoded, None)
    modules, rank = list(config.target_modules), config.rank
    latents = latents.view(layers, batch, len(modules), rank, -1).transpose(0, 1)

    for index in range(config.num_pre_head_layers):
        block = _inside(weights, f"layers.{index}.mlp")
        hidden = _layer_norm(_inside(block, "0"), latents)
        hidden = F.silu(F.linear(hidden, block["2.weight"], block["2.bias"]))
        hidden = F.linear(hidden, block["5.weight"], block["5.bias"])
        latents = latents + _layer_norm(_inside(block, "6"), hidden)
    latents = latents / latents.norm(dim=-1, keepdim=True)

    head = weights["head.weight"]
    if config.shared_head:
        head = head.expand(layers, *head.shape)
    if len(modules) == 1:
        head = head[:, None]
    flat = torch.einsum("blmrz,lmzw->blmrw", latents, head)
    a, b = {}, {}
    for place, (module, (d_in, d_out)) in enumerate(config.target_modules.items()):
        rows = flat[:, :, place]
        a[module] = rows[..., :d_in] * weights[f"scaler_A.{module}"]
        b[module] = rows[..., d_in : d_in + d_out] * weights[f"scaler_B.{module}"]
    return a, b


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    questions: Tensor | int,
    scale: float,
) -> Tensor:
    """Adapted linear: ``questions`` consecutive examples of x [E, T, d_in] use each adapter.

    ``questions`` is [n], or one number for all adapters.

    weight [d_out, d_in], lora_a [n, r, d_in], lora_b [n, r, d_out] -> [E, T, d_out].
    """
    lora_a = lora_a.repeat_interleave(questions, dim=0)
    lora_b = lora_b.repeat_interleave(questions, dim=0)
    shrunk = torch.einsum("btd,brd->btr", x, lora_a)
    return F.linear(x, weight) + torch.einsum("btr,brd->btd", shrunk, lora_b) * scale


def rank_projection(
    latents: Tensor, head: Tensor, scaler_a: Tensor, scaler_b: Tensor, *, d_in: int, d_out: int
) -> tuple[Tensor, Tensor]:
    """Rank latents [N, R, Z] of one layer to A [N, R, d_in] and B [N, R, d_out].

    head [Z, d_in + d_out], scalers [R].
    """
    latents = latents / latents.norm(dim=-1, keepdim=True)
    a, b = torch.einsum("nrz,zw->nrw", latents, head).split([d_in, d_out], dim=-1)
    return a * scaler_a[:, None], b * scaler_b[:, None]


def cross_attention(
    projections: Weights,
    norm_weight: Tensor,
    heads: tuple[int, int, int],
    latents: Tensor,
    context: Tensor,
) -> Tensor:
    """One block's attention of normed latents [N, Q, Z] to the normed context [N, S, Z] and them.

    projections: q_proj, k_proj, v_proj and o_proj ``.weight``; heads: query, key/value, width.
    """
    seen = _rms_norm(norm_weight, context)
    return _attention(projections, heads, latents, torch.cat([seen, latents], 1), None)


def swiglu(gate: Tensor, up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    """The modality projection: gate and up [H, D], down [Z, H], x [..., D] -> [..., Z]."""
    weights = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}
    return _swiglu(weights, x)


def _inside(weights: Weights, prefix: str) -> Weights:
    prefix += "."
    return {n[len(prefix) :]: w for n, w in weights.items() if n.startswith(prefix)}


def _rms_norm(weight: Tensor, x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + RMS_EPS)
    return weight * wide.to(x.dtype)


def _layer_norm(weights: Weights, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights["weight"], weights["bias"])


def _swiglu(weights: Weights, x: Tensor) -> Tensor:
    gated = F.silu(F.linear(x, weights["gate_proj.weight"]))
    return F.linear(gated * F.linear(x, weights["up_proj.weight"]), weights["down_proj.weight"])


def _resampler(
    weights: Weights,
    cross: list[bool],
    heads: tuple[int, int, int],
    context: Tensor,
    visible: Tensor | None,
) -> Tensor:
    """Latents [N, Q, Z] that read context [N, S, Z]; ``cross``: which layers see the context."""
    latents = weights["latents_q"].expand(context.shape[0], -1, -1)
    for index, sees_context in enumerate(cross):
        layer = _inside(weights, f"layers.{index}")
        normed = _rms_norm(layer["input_latents_layernorm.weight"], latents)
        attention = _inside(layer, "self_attn")
        if sees_context:
            seen = _rms_norm(layer["input_context_layernorm.weight"], context)
            mixed = _attention(attention, heads, normed, torch.cat([seen, normed], 1), visible)
        else:
            mixed = _attention(attention, heads, normed, normed, None)
        latents = latents + _rms_norm(layer["post_attention_layernorm.weight"], mixed)
        hidden = _rms_norm(layer["pre_ff_layernorm.weight"], latents)
        hidden = _swiglu(_inside(layer, "mlp"), hidden)
        latents = latents + _rms_norm(layer["post_ff_layernorm.weight"], hidden)
    return _rms_norm(weights["layernorm.weight"], latents)


def _attention(
    weights: Weights,
    heads: tuple[int, int, int],
    latents: Tensor,
    keyed: Tensor,
    visible: Tensor | None,
) -> Tensor:
    """Grouped-query attention of latents [N, Q, Z] to keyed [N, K, Z]; visible [N, <= K]."""
    num_heads, num_kv_heads, head_dim = heads
    n, count, _ = latents.shape
    query = F.linear(latents, weights["q_proj.weight"]).view(n, count, num_heads, head_dim)
    key, value = (
        F.linear(keyed, weights[name]).view(n, -1, num_kv_heads, head_dim).transpose(1, 2)
        for name in ("k_proj.weight", "v_proj.weight")
    )
    key, value = (
        t[:, :, None]
        .expand(-1, -1, num_heads // num_kv_heads, -1, -1)
        .reshape(n, num_heads, -1, head_dim)
        for t in (key, value)
    )
    scores = query.transpose(1, 2) @ key.mT / math.sqrt(head_dim)
    if visible is not None:
        # The latents behind the context are always visible.
        visible = F.pad(visible, (0, keyed.shape[1] - visible.shape[1]), value=True)
        bias = torch.zeros_like(visible, dtype=scores.dtype)
        bias = bias.masked_fill(~visible, torch.finfo(scores.dtype).min)
        scores = scores + bias[:, None, None]
    wide = torch.promote_types(scores.dtype, torch.float32)
    probs = torch.softmax(scores, dim=-1, dtype=wide).to(query.dtype)
    mixed = (probs @ value).transpose(1, 2).reshape(n, count, num_heads * head_dim)
    return F.linear(mixed, weights["o_proj.weight"])


# --- a training step -----------------------------------------------------------------------------


class Step(Protocol):
    """A training step without the optimizer; reports each stage when it is over."""

    def __call__(self, samples: list[Sample], total: int, stage: Stage) -> Tensor:
        """Sum of the examples' losses over ``total``; adds to the parameters' gradients."""


class ReleasedStep:
    """A training step on samples of one chunk and one question-answer pair each.

    Every example has its own video encoded by vision tower and decoder; ``bench.runs.train_step``
    says what is padded, materialized and repeated.
    """

    def __init__(self, network: HyperNetwork, backbone: SmolVLM) -> None:
        self.network, self.backbone = network, backbone
        self.text_model = backbone.model.model.text_model
        self.device = backbone.decoder.device

    def __call__(self, samples: list[Sample], total: int, stage: Stage) -> Tensor:
        views = torch.cat([one.chunks[0].pixels.to(self.device) for one in samples])
        seen = self.backbone.encode_views(views)
        stage("vision")
        features, mask = self._features(samples, seen)
        stage("text encode")
        factors = hypernetwork(self.network, features, mask)
        a, b = (side["down_proj"] for side in factors)
        biases = (self.network.bias_A["down_proj"], self.network.bias_B["down_proj"])
        sides = [
            torch.cat([rows, bias.expand(len(rows), *bias.shape)], 2)
            for rows, bias in zip((a, b), biases, strict=True)
        ]
        stage("hypernetwork forward")
        leaves = [side.detach().requires_grad_() for side in sides]
        loss = self._losses(samples, *leaves).sum() / total
        stage("answer forward")
        loss.backward()
        stage("answer backward")
        torch.autograd.backward(sides, [leaf.grad for leaf in leaves])
        stage("hypernetwork backward")
        return loss.detach()

    @torch.no_grad()
    def _features(self, samples: list[Sample], seen: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states entering every layer, float32 [B, L, S, D], and the mask [B, S]."""
        ids, mask = self._padded([one.chunks[0].ids for one in samples], 0)
        words = self.text_model.get_input_embeddings()(ids)
        image = (ids == self.backbone.image_token_id)[..., None]
        outputs = self.text_model(
            inputs_embeds=words.masked_scatter(image, seen.to(words.dtype)),
            attention_mask=mask,
            output_hidden_states=True,
            use_cache=False,
        )
        return torch.stack(outputs.hidden_states[:-1], 1).float(), mask

    def _losses(self, samples: list[Sample], a: Tensor, b: Tensor) -> Tensor:
        """Mean cross-entropy of each example, from logits of all positions."""
        rows, labels = [], []
        for one in samples:
            ((question, answer),) = one.qa_pairs
            prompt = one.prompt_prefix + question
            rows.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([IGNORED] * len(prompt) + answer))
        ids, mask = self._padded(rows, 0)
        targets, _ = self._padded(labels, IGNORED)
        with self._adapted(a, b):
            hidden = self.text_model(
                input_ids=ids, attention_mask=mask, use_cache=False
            ).last_hidden_state
        logits = self.backbone.model.lm_head(hidden).float()[:, :-1]
        targets = targets[:, 1:]
        each = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        ).view(targets.shape)
        return each.sum(1) / (targets != IGNORED).sum(1)

    @contextlib.contextmanager
    def _adapted(self, a: Tensor, b: Tensor) -> Iterator[None]:
        """Adapters [B, L, r, d] in force on every down projection, one an example."""
        scale = self.network.config.scale

        def hook(layer: int) -> Callable:
            def add(module: torch.nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
                ones = torch.ones(len(out), dtype=torch.int64, device=out.device)
                mine_a = a[:, layer].to(out.dtype).repeat_interleave(ones, dim=0)
                mine_b = b[:, layer].to(out.dtype).repeat_interleave(ones, dim=0)
                shrunk = torch.einsum("btd,brd->btr", inputs[0], mine_a)
                return out + torch.einsum("btr,brd->btd", shrunk, mine_b) * scale

            return add

        handles = [
            layer.mlp.down_proj.register_forward_hook(hook(index))
            for index, layer in enumerate(self.text_model.layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _padded(self, rows: list[Tensor], value: int) -> tuple[Tensor, Tensor]:
        """Rows of ids padded on the right to [B, T], and 1 where they are, on the device."""
        padded = pad_sequence(rows, batch_first=True, padding_value=value)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return padded.to(self.device), mask.to(self.device)
