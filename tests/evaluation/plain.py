"""The frozen VLM with a LoRA update written into its weights, run by transformers' own forward."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch

from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.vlm.smolvlm import SmolVLM


def with_update(backbone: SmolVLM, adapter: Adapter, without: Collection[int] = ()):
    """The transformers model with W + s·BᵀA: the bias everywhere, the generated part but in the
    layers ``without``."""
    model = copy.deepcopy(backbone.model)
    for index, layer in enumerate(model.model.text_model.layers):
        for module, a in adapter.A.items():
            weight = getattr(layer.mlp, module).weight.data
            pairs = [(adapter.bias.A[module], adapter.bias.B[module])] if adapter.bias else []
            if index not in without:
                pairs.append((a, adapter.B[module]))
            for a_all, b_all in pairs:
                delta = adapter.scale * b_all[index].double().T @ a_all[index].double()
                weight += delta.to(weight)
    return model


@torch.no_grad()
def log_probability(backbone: SmolVLM, model, prompt: str, text: str) -> float:
    """Eq. 10, token by token."""
    question, answer = (
        backbone.prompt_builder.question(prompt),
        backbone.prompt_builder.ids(f" {text}"),
    )
    logits = model(input_ids=torch.tensor([question + answer]), use_cache=False).logits[0]
    total = 0.0
    for t, token in enumerate(answer):
        before = len(question) + t - 1
        total += logits[before].double().log_softmax(-1)[token].item()
    return total / len(answer)
