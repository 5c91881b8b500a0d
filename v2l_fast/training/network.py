"""The hypernetwork a run trains: fitted to its base, fresh or from one that was trained before."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from v2l_fast.errors import ConfigError
from v2l_fast.hypernet.config import HypernetConfig
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.loading import load_hypernet
from v2l_fast.training.config import FROM_DATA, TrainConfig
from v2l_fast.vlm import Backbone

DEFAULT_MODULES = ("down_proj",)


def hypernet_config(config: TrainConfig, backbone: Backbone) -> HypernetConfig:
    """The architecture: sizes from the base, sampling from `data`, the rest from `model.hypernet`.

    Raises:
        ConfigError: a value cannot work.
    """
    chosen = dict(config.model.hypernet)
    names = chosen.pop("target_modules", DEFAULT_MODULES)
    linears = {name: backbone.linear(0, name) for name in names}
    return HypernetConfig(
        hidden_size=backbone.hidden_size,
        num_layers=backbone.decoder.num_layers,
        target_modules={n: (x.in_features, x.out_features) for n, x in linears.items()},
        base_model_name_or_path=config.model.base or config.data.source,
        **{name: getattr(config.data, name) for name in FROM_DATA},
        **chosen,
    )


def make_hypernet(config: TrainConfig, backbone: Backbone) -> HyperNetwork:
    """A fresh network, or that of `model.init` with what it does not know fresh.

    Raises:
        ConfigError: the two differ in architecture, but for parts that `model.init` lacks.
    """
    torch.manual_seed(config.run.seed)
    if not config.model.init:
        return HyperNetwork(hypernet_config(config, backbone))
    started, _ = load_hypernet(config.model.init)
    inherited = {
        field.name: getattr(started.config, field.name)
        for field in dataclasses.fields(HypernetConfig)
        if field.name not in ("base_model_name_or_path", *FROM_DATA)
    }
    own = hypernet_config(config, backbone)
    wanted = dataclasses.replace(
        own, **{k: v for k, v in inherited.items() if k not in config.model.hypernet}
    )
    network = HyperNetwork(wanted)
    state, known = network.state_dict(), started.state_dict()
    for name, value in known.items():
        if name not in state or state[name].shape != value.shape:
            raise ConfigError(
                f"model.init={config.model.init}: its {name} does not fit model.hypernet and the "
                f"base {backbone.name_or_path}; leave out the fields that it was not trained with"
            )
    network.load_state_dict(state | known)
    return network


def export(network: HyperNetwork, folder: Path, dtype: torch.dtype) -> None:
    """Write a copy of `dtype` as `HyperNetwork.from_pretrained` and `v2l` load it."""
    with torch.device("meta"):
        copy = HyperNetwork(network.config)
    copy.load_state_dict(
        {name: value.detach().to("cpu", dtype) for name, value in network.state_dict().items()},
        assign=True,
    )
    copy.save_pretrained(folder)
