"""Outputs of the released code on random weights, and the networks that must reproduce them.

Each file of ``fixtures/golden`` holds inputs, outputs and gradients of one case. Networks: ``a``
has stored weights, ``nano_sa`` (with self-attention blocks) weights by formula. Relative errors are
Frobenius norms: an RMSNorm eps of 1e-5 instead of 1e-6 shows as 3e-4, a LayerNorm eps of 1e-6
instead of 1e-5 as 6e-6, anything structural as 0.2 or more.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.formula import hypernet_parameter
from v2l_fast.hypernet.config import HypernetConfig
from v2l_fast.hypernet.network import HyperNetwork

FOLDER = Path(__file__).parent / "fixtures" / "golden"

CONFIGS = {
    "a": HypernetConfig(
        hidden_size=64,
        num_layers=3,
        target_modules={"down_proj": (128, 64)},
        rank=4,
        latent_size=32,
        num_latents=5,
        num_blocks=2,
    ),
    "nano_sa": HypernetConfig(
        hidden_size=16,
        num_layers=2,
        target_modules={"down_proj": (24, 16)},
        rank=2,
        latent_size=8,
        num_latents=3,
        num_blocks=2,
        num_self_attn_per_block=1,
    ),
}


def load(name: str) -> dict[str, Tensor]:
    """Tensors of ``fixtures/golden/<name>.safetensors``."""
    return load_file(FOLDER / f"{name}.safetensors")


def network(name: str) -> HyperNetwork:
    """A fresh golden network, float32."""
    with torch.device("meta"):
        net = HyperNetwork(CONFIGS[name])
    if name == "a":
        state = load("a/state")
    else:
        state = {k: hypernet_parameter(k, tuple(v.shape)) for k, v in net.state_dict().items()}
    net.load_checked(state, name)
    return net


def relative(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖, in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm()).item()
