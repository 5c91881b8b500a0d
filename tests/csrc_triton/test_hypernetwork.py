"""A whole hypernetwork trains in float32 through the kernels."""

from __future__ import annotations

import torch

from tests import tiny


def loss_and_gradients(network, features, mask) -> list[torch.Tensor]:
    network.zero_grad()
    batch = network(features, mask)
    loss = sum(f.square().sum() for f in (*batch.A.values(), *batch.B.values()))
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]


def test_float32_training(kernel_device, monkeypatch):
    network = tiny.hypernetwork().to(kernel_device)
    config = network.config
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, config.num_layers, 9, config.hidden_size, generator=generator)
    features = features.to(kernel_device)
    mask = torch.arange(9, device=kernel_device) < features.new_tensor([9, 4])[:, None]
    results = loss_and_gradients(network, features, mask)
    monkeypatch.setenv("V2L_BACKEND", "reference")
    expected = loss_and_gradients(network, features, mask)
    assert len(results) == len(expected) > 1
    for r, e in zip(results, expected, strict=True):
        assert r.dtype == torch.float32
        assert (r - e).norm() <= 1e-3 * e.norm()
