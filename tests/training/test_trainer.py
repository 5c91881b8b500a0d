"""The hypernetwork trainer: exact resume, atomic checkpoints, falling loss."""

import json

import pytest
import torch

from v2l_fast.config import HypernetConfig
from v2l_fast.errors import CheckpointError
from v2l_fast.hypernet import HyperNetwork
from v2l_fast.training.checkpoint import latest_checkpoint, load_checkpoint, named_parameters
from v2l_fast.training.trainer import TrainSettings, make_optimizer, train, write_record

CONFIG = HypernetConfig(
    hidden_size=8,
    num_layers=2,
    target_modules={"down_proj": (12, 8)},
    rank=2,
    latent_size=16,
    num_latents=3,
    num_blocks=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
)
SETTINGS = TrainSettings(
    steps=24, batch=4, lr=3e-3, warmup=4, checkpoint_every=5, log_every=4, keep_checkpoints=2
)


def make():
    """A nano network and a task: the update of a layer should be a fixed map of its context."""
    torch.manual_seed(0)
    network = HyperNetwork(CONFIG)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(10, 2, 5, 8, generator=generator)
    wanted = features.mean(2) @ torch.randn(8, 8, generator=generator) * 0.3

    def step_loss(indices, step):
        picked = torch.tensor(indices)
        # Noise from torch's own generator: a resume must restore it too.
        noisy = features[picked] + 0.01 * torch.randn(len(indices), 2, 5, 8)
        batch = network(noisy).composed()
        update = torch.einsum(
            "blrd,blro->blo", batch.A["down_proj"], batch.B["down_proj"]
        )
        loss = (update - wanted[picked]).square().mean()
        return loss, {"update": update.abs().mean().item()}

    return network, step_loss


def state(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def test_a_stopped_run_continues_bit_for_bit(tmp_path):
    network, loss = make()
    whole = train(network, loss, 10, SETTINGS, tmp_path / "whole", quiet=True)
    expected = state(network)

    for stop in (7, 9, None):
        network, loss = make()
        record = train(
            network, loss, 10, SETTINGS, tmp_path / "parts", stop_after=stop, quiet=True
        )
    assert all(torch.equal(value, expected[name]) for name, value in state(network).items())
    assert record["last"] == whole["last"]
    curves = [
        {x["step"]: x["loss"] for x in map(json.loads, (tmp_path / n / "log.jsonl").open())}
        for n in ("whole", "parts")
    ]
    assert all(curves[1][step] == value for step, value in curves[0].items())


def test_loss_falls_and_old_checkpoints_go(tmp_path):
    network, loss = make()
    train(network, loss, 10, SETTINGS, tmp_path, quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["log.jsonl", "step-00000020.safetensors", "step-00000024.safetensors"]


def test_scalers_train_faster_and_without_decay():
    network, _ = make()
    others, scalers = make_optimizer(network, SETTINGS).param_groups
    assert scalers["factor"] == 5.0 and scalers["weight_decay"] == 0.0
    assert others["weight_decay"] == 0.01
    assert len(scalers["params"]) == 2
    total = len(scalers["params"]) + len(others["params"])
    assert total == len(named_parameters(network))


def test_another_models_checkpoint_is_refused(tmp_path):
    network, loss = make()
    train(network, loss, 10, SETTINGS, tmp_path, stop_after=1, quiet=True)
    other = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="not this model's"):
        load_checkpoint(
            latest_checkpoint(tmp_path), named_parameters(other), torch.optim.AdamW([other.weight])
        )


def test_a_broken_checkpoint_is_named(tmp_path):
    path = tmp_path / "step-00000001.safetensors"
    path.write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    network, loss = make()
    with pytest.raises(CheckpointError, match="step-00000001"):
        train(network, loss, 10, SETTINGS, tmp_path, quiet=True)


def test_records_are_written_whole(tmp_path):
    write_record(tmp_path / "a" / "record.json", {"x": 1})
    assert json.loads((tmp_path / "a" / "record.json").read_text()) == {"x": 1}
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["record.json"]
