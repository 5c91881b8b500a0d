"""Sizes of generated updates: per rank direction and per layer, and how stable their order is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from v2l_fast.analysis.layers import mean_layer_norms
from v2l_fast.errors import ConfigError
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.model import Video2LoRA


def adapter_norms(model: Video2LoRA, adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Norms over adapters of one rank.

    Returns:
        "adapters", "rank", and "modules": for each module "rank_norms" [L, r], mean products
        ‖A_r‖·‖B_r‖; "layer_norms" [L], mean Frobenius norms of s·Bᵀ A; "relative_norms" [L], the
        same over the norm of the frozen weight; "largest" and "smallest": direction -> share of
        adapters in which its product, averaged over layers, is the largest or smallest
        (Appendix C.2 finds one direction on top in every video).

    Raises:
        ConfigError: adapters of several ranks.
    """
    ranks = {adapter.rank for adapter in adapters}
    if len(ranks) != 1:
        raise ConfigError(f"norms are compared between adapters of one rank, not {sorted(ranks)}")
    products = [adapter.norms()["rank"] for adapter in adapters]
    layers = mean_layer_norms(adapters)
    modules = {}
    for module in products[0]:
        stacked = torch.stack([p[module].cpu() for p in products])
        per_direction = stacked.mean(1)
        frozen = [
            model.backbone.linear(layer, module).weight.float().norm().item()
            for layer in range(adapters[0].num_layers)
        ]
        modules[module] = {
            "rank_norms": stacked.mean(0).tolist(),
            "layer_norms": layers[module],
            "relative_norms": [n / w for n, w in zip(layers[module], frozen, strict=True)],
            "largest": _shares(per_direction.argmax(1)),
            "smallest": _shares(per_direction.argmin(1)),
        }
    return {"adapters": len(adapters), "rank": ranks.pop(), "modules": modules}


def _shares(winners: torch.Tensor) -> dict[str, float]:
    counts = winners.bincount()
    order = counts.argsort(descending=True, stable=True)
    return {f"R{r}": counts[r].item() / len(winners) for r in order.tolist() if counts[r]}
