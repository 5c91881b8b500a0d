"""A decoder of toy size for the hypernetwork of ``tests/tiny.py``, of any depth and dtype."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaModel

from tests import tiny
from v2l_fast.vlm.decoder import Decoder

INNER, SIZE = tiny.CONFIG.target_modules["down_proj"]
VOCABULARY = 50


def decoder(layers: int, dtype: torch.dtype = torch.float32) -> Decoder:
    """Random weights, frozen; grouped-query attention."""
    config = LlamaConfig(
        hidden_size=SIZE,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = torch.nn.Linear(SIZE, VOCABULARY, bias=False)
        modules = torch.nn.ModuleList([LlamaModel(config), head])
    return Decoder(*modules.to(dtype).eval().requires_grad_(False))
