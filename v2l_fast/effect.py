"""Did an adapter do anything? Its size against the frozen weights, and what it changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from v2l_fast.generation import SamplingParams, answer_prompts
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.hypernet.adapter_bank import AdapterBank
from v2l_fast.vlm import Backbone


@dataclass(frozen=True)
class Effect:
    """Did the adapter do anything?

    Attributes:
        update_norms: module -> Frobenius norm of each layer's generated update, [L].
        relative_norms: the same divided by the norm of the layer's frozen weight, [L].
        logit_shift: largest change of any logit of the first answer token.
        divergence: KL(with adapter ‖ without) of the first answer token's distribution, nats.
        answer: the answer with the adapter.
        answer_without: the answer of the same model without it.
    """

    update_norms: dict[str, list[float]]
    relative_norms: dict[str, list[float]]
    logit_shift: float
    divergence: float
    answer: str
    answer_without: str


@torch.inference_mode()
def measure_effect(backbone: Backbone, adapter: Adapter, question: str) -> Effect:
    """:class:`Effect` of an adapter, its bias included, on the greedy answer to a question."""
    decoder = backbone.decoder
    prompt = backbone.question(question)
    slots = AdapterBank.pack([adapter], decoder.device, decoder.dtype)
    plain, adapted = (
        decoder.logits(decoder.forward(prompt.embeddings[None], adapters=s)[0, -1])
        for s in (None, slots)
    )
    log_plain, log_adapted = plain.log_softmax(-1), adapted.log_softmax(-1)
    norms = adapter.norms()["layer"]
    answers = answer_prompts(backbone, [lambda: prompt] * 2, [adapter, None], SamplingParams())
    with_adapter, without = (answer.text for answer in answers)
    return Effect(
        {m: n.tolist() for m, n in norms.items()},
        {m: (n.cpu() / _weight_norms(backbone, m)).tolist() for m, n in norms.items()},
        (adapted - plain).abs().max().item(),
        (log_adapted.exp() * (log_adapted - log_plain)).sum().item(),
        with_adapter,
        without,
    )


def _weight_norms(backbone: Backbone, module: str) -> Tensor:
    linears = (backbone.linear(i, module) for i in range(backbone.decoder.num_layers))
    return torch.stack([linear.weight.float().norm().cpu() for linear in linears])
