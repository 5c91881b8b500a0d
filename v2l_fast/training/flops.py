"""Floating-point operations of a step and of a device, for model FLOPs utilization (MFU).

Operations are computed from sizes and token counts: matrix products only, a multiply-add as two.
Recomputation in the backward pass does not count, as is usual for MFU. Peaks are the datasheets'
dense bfloat16 figures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from csrc_triton.device import peak_of
from v2l_fast.data.samples import Sample
from v2l_fast.hypernet.config import HypernetConfig
from v2l_fast.vlm import Backbone


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of a device; None for a CPU and unknown GPUs."""
    if device.type != "cuda":
        return None
    peak = peak_of(torch.cuda.get_device_name(device))
    return None if peak is None else peak.flops


@dataclass(frozen=True)
class StepCost:
    """Operations per token of each part of the step.

    Attributes:
        view: vision tower and connector per view, forward.
        context: decoder layers before the last per context token, forward.
        hypernet: all layer slices per context token, forward and backward.
        chunk: all layer slices per chunk, forward and backward, whatever the context's length.
        answer: decoder per token of a response row, forward and backward to the inputs of all
            layers but the first.
        update: the ranks that a chunk, or the bias adapter, adds to `answer`.
        logits: LM head per answer token, forward and backward to its input.
        attention: one pair of tokens in one decoder layer, forward.
        layers: number of decoder layers.
        shared: 1 with a bias adapter, else 0.
    """

    view: float
    context: float
    hypernet: float
    chunk: float
    answer: float
    update: float
    logits: float
    attention: float
    layers: int
    shared: int

    @classmethod
    def of(cls, backbone: Backbone, config: HypernetConfig) -> StepCost:
        """The costs of a frozen model with a hypernetwork of `config`."""
        decoder = backbone.decoder
        layer = sum(p.numel() for p in decoder.text_model.layers[0].parameters() if p.dim() == 2)
        layers, dim, size = decoder.num_layers, config.hidden_size, config.latent_size
        heads = config.num_heads * config.head_dim
        rows = config.num_latents * config.num_heads
        decoded = len(config.target_modules) * config.rank
        widths = sum(sum(sizes) for sizes in config.target_modules.values())
        # Per context token: gate and up (frozen input: no gradient to it), down, then scores and
        # values of every latent row.
        token = 2 * 2 * (2 * dim * 4 * dim)
        token += 3 * (2 * 4 * dim * size + config.num_blocks * 4 * rows * size)
        # Per slice: projections and MLPs of the latents, the head.
        latent = 2 * (2 * size * heads + 3 * 4 * size * size)
        head = 2 * config.rank * size * widths
        slice_ = config.num_blocks * config.num_latents * latent + decoded * latent + head
        vision = backbone.model.model
        tower = sum(p.numel() for p in vision.vision_model.encoder.parameters() if p.dim() == 2)
        patches = backbone.tokens_per_view * backbone.model.config.scale_factor**2
        connector = sum(p.numel() for p in vision.connector.parameters() if p.dim() == 2)
        vision_layers = len(vision.vision_model.encoder.layers)
        width = backbone.model.config.vision_config.hidden_size
        return cls(
            view=2 * tower * patches
            + 4 * patches**2 * width * vision_layers
            + 2 * connector * backbone.tokens_per_view,
            context=2 * layer * (layers - 1),
            hypernet=token * layers,
            chunk=3 * slice_ * layers,
            answer=2 * layer * (2 * layers - 1),
            update=6 * config.rank * widths * layers,
            logits=4 * dim * decoder.lm_head.out_features,
            attention=4 * dim,
            layers=layers,
            shared=int(config.bias_adapter),
        )

    def sample(self, sample: Sample) -> float:
        """Operations of one video."""
        return self.contexts(sample) + self.responses(sample)

    def contexts(self, sample: Sample) -> float:
        """Operations of its adapter: encoding every chunk, and the hypernetwork."""
        total = 0.0
        for chunk in sample.chunks:
            tokens = len(chunk.ids)
            views = 0 if chunk.pixels is None else len(chunk.pixels)
            pairs = tokens * tokens / 2 * self.attention * (self.layers - 1)
            total += views * self.view + tokens * (self.context + self.hypernet)
            total += self.chunk + pairs
        return total

    def responses(self, sample: Sample) -> float:
        """Operations of its loss: each response is a row of its own, without its last token."""
        token = self.answer + self.update * (len(sample.chunks) + self.shared)
        # The backward pass needs two products for each of the forward's.
        pair = self.attention * (self.layers + 2 * (self.layers - 1))
        total = 0.0
        for question, answer in sample.qa_pairs:
            tokens = len(sample.prompt_prefix) + len(question) + len(answer) - 1
            total += tokens * token + tokens * tokens / 2 * pair + len(answer) * self.logits
        return total
