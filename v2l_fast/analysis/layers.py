"""What each layer's update does to the reference's likelihood (paper Appendix D.2, Figure 7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from v2l_fast.analysis.examples import (
    ANOTHER,
    NONE,
    Example,
    Progress,
    interval,
    other_adapters,
    silent,
)
from v2l_fast.analysis.scores import diagnostic_scores
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.model import Video2LoRA


def removal_effects(model: Video2LoRA, example: Example, adapter: Adapter) -> torch.Tensor:
    """[L + 2] float64: S with the adapter, Effect of removing each layer (Eq. 12), S without any.

    Only the generated update is removed; the shared bias adapter stays. "Without any" is the plain
    model.
    """
    without = [adapter.without_layers([layer]) for layer in range(adapter.num_layers)]
    scores = diagnostic_scores(model, example.prompt, example.references, [adapter, *without, None])
    scores[1:-1] -= scores[0]
    return scores


def layer_removal(
    model: Video2LoRA,
    examples: Sequence[Example],
    adapters: Sequence[Adapter],
    progress: Progress = silent,
) -> dict[str, Any]:
    """Effects over examples, with the update norms they are to be seen beside.

    Returns:
        "examples"; "score": interval of S, nats a token; "controls": condition -> the same; "rows":
        for each layer "effect" (interval) and "norm", module -> mean Frobenius norm of s·Bᵀ A.
    """
    found = []
    for done, (example, adapter) in enumerate(zip(examples, adapters, strict=True)):
        progress("removing layers", done, len(examples))
        found.append(removal_effects(model, example, adapter))
    progress("removing layers", len(examples), len(examples))
    table = torch.stack(found)
    controls = {NONE: table[:, -1].tolist()}
    if others := other_adapters(examples, adapters):
        controls[ANOTHER] = [
            diagnostic_scores(model, example.prompt, example.references, [other]).item()
            for example, other in zip(examples, others, strict=True)
        ]
    norms = mean_layer_norms(adapters)
    rows = [
        {
            "layer": layer,
            "effect": interval(table[:, 1 + layer].tolist(), examples, None),
            "norm": {module: values[layer] for module, values in norms.items()},
        }
        for layer in range(table.shape[1] - 2)
    ]
    return {
        "examples": len(examples),
        "score": interval(table[:, 0].tolist(), examples, None),
        "controls": {name: interval(scores, examples, None) for name, scores in controls.items()},
        "rows": rows,
    }


def mean_layer_norms(adapters: Sequence[Adapter]) -> dict[str, list[float]]:
    """Module -> [L] Frobenius norm of the generated update, mean over adapters."""
    norms = [adapter.norms()["layer"] for adapter in adapters]
    return {m: torch.stack([n[m] for n in norms]).mean(0).tolist() for m in norms[0]}
