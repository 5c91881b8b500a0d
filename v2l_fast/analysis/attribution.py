"""Direct logit attribution: where an adapter turns the residual stream towards the answer
(paper Appendix D.3, Eq. 13, Figure 8).

The position is the prompt's last token, whose output is the answer's first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from v2l_fast.analysis.examples import Example, Progress, interval, silent
from v2l_fast.analysis.scores import candidate_ids, log_probabilities
from v2l_fast.hypernet.adapted_linear import AdapterBank
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.model import Video2LoRA


@dataclass(frozen=True)
class Attribution:
    """Shifts projected on the answer direction, [L] float32 each.

    Attributes:
        whole: DLA of the residual stream behind each layer; the running sum of the parts.
        attention: DLA of what each layer's attention adds.
        mlp: DLA of what each layer's MLP adds.
    """

    whole: Tensor
    attention: Tensor
    mlp: Tensor


@torch.inference_mode()
def residual_shifts(
    model: Video2LoRA, prompt: str, adapter: Adapter
) -> tuple[Tensor, Tensor, Tensor]:
    """What the adapter changes at the prompt's last token.

    Returns:
        Δx, Δa and Δm, [L, D] float32 each: of the residual stream behind each layer, of what its
        attention adds and of what its MLP adds.
    """
    decoder = model.backbone.decoder
    embeddings = model.backbone.question(prompt).embeddings
    slots = AdapterBank.pack([None, model.attach(adapter)], decoder.device, decoder.dtype)
    hidden = embeddings.expand(2, *embeddings.shape)
    span = decoder.prefill_metadata(*hidden.shape[:2])
    shifts: tuple[list[Tensor], ...] = ([], [], [])
    for index, layer in enumerate(decoder.text_model.layers):
        attention = decoder.attention_block(layer, index, hidden, span, adapters=slots)
        hidden = hidden + attention
        mlp = decoder.mlp_block(layer, index, hidden, slots)
        hidden = hidden + mlp
        for kept, rows in zip(shifts, (hidden, attention, mlp), strict=True):
            base, adapted = rows[:, -1].float()
            kept.append(adapted - base)
    whole, attention, mlp = (torch.stack(kept) for kept in shifts)
    return whole, attention, mlp


def answer_direction(model: Video2LoRA, reference: str) -> Tensor:
    """d̂: the normalized mean output embedding of the reference's tokens, [D] float32."""
    (ids,) = candidate_ids(model, [reference])
    weight = model.backbone.decoder.lm_head.weight
    mean = weight[torch.tensor(ids, device=weight.device)].detach().float().mean(0)
    return mean / mean.norm()


def attribute(model: Video2LoRA, example: Example, adapter: Adapter) -> Attribution:
    """DLA of one example, towards the reference that the adapter makes most likely (Eq. 11)."""
    likely = log_probabilities(model, example.prompt, example.references, [adapter])[0].argmax()
    direction = answer_direction(model, example.references[int(likely)])
    shifts = residual_shifts(model, example.prompt, adapter)
    return Attribution(*((shift @ direction).cpu() for shift in shifts))


def logit_attribution(
    model: Video2LoRA,
    examples: Sequence[Example],
    adapters: Sequence[Adapter],
    progress: Progress = silent,
) -> dict[str, Any]:
    """DLA over examples.

    Returns:
        "examples", and "rows": for each layer the intervals of "whole", "attention" and "mlp".
    """
    found = []
    for done, (example, adapter) in enumerate(zip(examples, adapters, strict=True)):
        progress("attributing logits", done, len(examples))
        found.append(attribute(model, example, adapter))
    progress("attributing logits", len(examples), len(examples))
    parts = ("whole", "attention", "mlp")
    columns = {part: torch.stack([getattr(a, part) for a in found]) for part in parts}
    rows = [
        {
            "layer": layer,
            **{p: interval(columns[p][:, layer].tolist(), examples, None) for p in parts},
        }
        for layer in range(adapters[0].num_layers)
    ]
    return {"examples": len(examples), "rows": rows}
