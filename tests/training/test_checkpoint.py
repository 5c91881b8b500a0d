"""Training checkpoints: whole or absent, rotated, refused for another model or other settings."""

import pytest
import torch

from tests import tiny
from v2l_fast.errors import CheckpointError
from v2l_fast.training.checkpoint import (
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    named_parameters,
    read_progress,
    refuse_other_settings,
    rotate_checkpoints,
    save_checkpoint,
)


def trained(steps: int = 2):
    network = tiny.hypernetwork()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in network.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return network, optimizer


def test_a_round_trip_is_exact(tmp_path):
    network, optimizer = trained()
    path = checkpoint_path(tmp_path, 2)
    save_checkpoint(path, named_parameters(network), optimizer, {"step": 2, "x": [0.1, None]})
    assert read_progress(path) == {"step": 2, "x": [0.1, None]}
    other, fresh = trained(0)
    assert load_checkpoint(path, named_parameters(other), fresh) == {"step": 2, "x": [0.1, None]}
    saved, loaded = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert saved.keys() == loaded.keys()
    for index, state in saved.items():
        for key, value in state.items():
            assert torch.equal(value, loaded[index][key])
    for (_, one), (_, two) in zip(
        network.named_parameters(), other.named_parameters(), strict=True
    ):
        assert torch.equal(one, two)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002.safetensors"]


def test_the_latest_few_are_kept(tmp_path):
    network, optimizer = trained()
    for step in (5, 20, 100, 1000):
        path = checkpoint_path(tmp_path, step)
        save_checkpoint(path, named_parameters(network), optimizer, {"step": step})
        rotate_checkpoints(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-00000100.safetensors", "step-00001000.safetensors",
    ]  # fmt: skip
    assert read_progress(latest_checkpoint(tmp_path))["step"] == 1000


def test_another_models_checkpoint_is_refused(tmp_path):
    network, optimizer = trained()
    path = checkpoint_path(tmp_path, 1)
    save_checkpoint(path, named_parameters(network), optimizer, {"step": 1})
    other = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="of another model"):
        load_checkpoint(path, named_parameters(other), torch.optim.AdamW([other.weight]))


def test_other_settings_are_named():
    saved = {"optim.lr": 1e-3, "data.chunks": [1], "gone": 1}
    refuse_other_settings("x", saved, {"optim.lr": 1e-3, "data.chunks": (1,), "gone": 1})
    with pytest.raises(CheckpointError, match=r"x: made with data.chunks=\[1\], now it is \[1, 2"):
        refuse_other_settings("x", saved, {**saved, "data.chunks": (1, 2)})
    with pytest.raises(CheckpointError, match="gone=1, now it is null .and 1 more settings differ"):
        refuse_other_settings("x", saved, {"optim.lr": 1e-4, "data.chunks": [1]})


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{}", b"text"])
def test_a_broken_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "step-00000001.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="step-00000001.safetensors: not a whole"):
        read_progress(path)


def test_other_safetensors_are_no_checkpoints(tmp_path):
    tiny.hypernetwork().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="not a complete training checkpoint"):
        read_progress(tmp_path / "model.safetensors")
