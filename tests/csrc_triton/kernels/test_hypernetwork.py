"""A whole hypernetwork trains in float32 through the kernels, in Triton's interpreter."""

from __future__ import annotations

import torch

from tests import tiny


def _trained(network, features, mask) -> list[torch.Tensor]:
    network.zero_grad()
    batch = network(features, mask)
    loss = sum(f.square().sum() for f in (*batch.A.values(), *batch.B.values()))
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]


def test_float32_training(monkeypatch):
    network = tiny.hypernetwork()
    config = network.config
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, config.num_layers, 9, config.hidden_size, generator=generator)
    mask = torch.arange(9) < torch.tensor([9, 4])[:, None]
    expected = _trained(network, features, mask)
    monkeypatch.setenv("V2L_BACKEND", "triton")
    found = _trained(network, features, mask)
    assert len(found) == len(expected) > 1
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == torch.float32
        assert (f - e).norm() <= 1e-3 * e.norm()
