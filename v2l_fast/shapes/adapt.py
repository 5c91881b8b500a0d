"""The tiny VLM's down projections with an adapter per row of the batch, for a `with` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers import SmolVLMForConditionalGeneration

from csrc_triton import lora_linear
from v2l_fast.adapter import AdapterBatch


@contextmanager
def adapted(
    model: SmolVLMForConditionalGeneration, batch: AdapterBatch, index: Tensor
) -> Iterator[None]:
    """Row i of the model's batch uses adapter index[i] (int64 [rows]) of `batch`; -1 means none."""
    joined = batch.composed()
    handles = []
    for number, layer in enumerate(model.model.text_model.layers):
        a, b = joined.A["down_proj"][:, number], joined.B["down_proj"][:, number]

        def hook(module, args, output, a=a, b=b):
            return lora_linear(args[0], module.weight, None, a, b, index, joined.scale)

        handles.append(layer.mlp.down_proj.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
