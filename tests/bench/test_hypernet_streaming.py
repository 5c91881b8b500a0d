"""The hypernetwork's benchmark counts the products that its network computes."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bench.models import SHAPES, random_hypernet
from bench.runs.hypernet_streaming import latent_flops, plain_products
from csrc_triton import dispatch

TOKENS = 24
PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_flops_of_the_latents_are_those_of_the_products_without_the_context(monkeypatch):
    # The profiler counts no FLOPs of oneDNN's products.
    monkeypatch.setattr(dispatch, "prefers_onednn", lambda x: False)
    network = random_hypernet(SHAPES["tiny"]).eval()
    config = network.config
    d, z = config.hidden_size, config.latent_size
    hidden = torch.randn(1, TOKENS, d)
    options = {"activities": [ProfilerActivity.CPU], "record_shapes": True, "with_flops": True}
    with torch.inference_mode(), profile(**options) as profiled:
        network.layer(0, hidden)
    flops = sum(e.flops for e in profiled.key_averages() if e.key in PRODUCTS)
    rows = config.num_heads * config.num_latents
    context = 2 * 2 * d * 4 * d + 2 * 4 * d * z + config.num_blocks * 4 * rows * z
    assert flops == TOKENS * context + latent_flops(network)
    products = plain_products(network, TOKENS, 1, torch.float32)
    assert flops == sum(product["flops"] for product in products)
