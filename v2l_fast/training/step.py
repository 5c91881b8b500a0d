"""One training step's forward pass: features to adapters, adapters to answer logits.

Responsible for the path that gradients take through the frozen VLM. Which turns are asked and how
losses are weighed is the task's.
"""

from __future__ import annotations

from torch import Tensor

from v2l_fast.adapted import AdapterSlots
from v2l_fast.adapter import AdapterBatch
from v2l_fast.backbones.decoder import Decoder
from v2l_fast.hypernet import HyperNetwork
from v2l_fast.training.turns import PackedTurns


def generate_adapters(
    hypernet: HyperNetwork, features: Tensor, mask: Tensor | None = None, recompute: bool = True
) -> AdapterBatch:
    """Adapters of features [B, L, S, D] with mask [B, S] (1 where visible).

    recompute: redo each layer's activations in the backward pass (long contexts), or keep them
    (short ones, where the time counts more than the memory).
    """
    if recompute:
        return hypernet(features, mask)
    layers = range(hypernet.config.num_layers)
    return hypernet.assemble([hypernet.layer(i, features[:, i], mask) for i in layers])


def answer_logits(
    decoder: Decoder, packed: PackedTurns, adapters: AdapterBatch | None, index: Tensor
) -> Tensor:
    """Logits [N, vocabulary], fp32, at the answer positions of rows without a video.

    Row i runs with adapter index[i] (int64 [rows]; -1 is none), the shared bias included.
    """
    embeds = decoder.embed(packed.ids)
    slots = None if adapters is None else AdapterSlots.of_batch(adapters.composed(), index)
    hidden = decoder.forward(embeds, decoder.span(packed.positions, packed.mask), adapters=slots)
    return decoder.logits(hidden[packed.rows, packed.columns])
