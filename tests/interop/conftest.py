"""Checkpoints as released training writes them, and a tiny base model, for the interop tests."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType
from transformers import SmolVLMForConditionalGeneration

from tests import tiny
from v2l_fast.hypernet.config import HypernetConfig
from v2l_fast.hypernet.network import HyperNetwork

RELEASED = {
    "ctx_to_lora.modeling.hypernet": "HypernetConfig",
    "ctx_to_lora.modeling.aggregator": "AggregatorConfig",
    "ctx_to_lora.configs": "CtxEncoderArguments",
}


@pytest.fixture
def data() -> Path:
    return Path(__file__).parents[1] / "fixtures" / "interop"


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Importable stand-ins for the classes that released checkpoints pickle."""
    classes = {}
    for module_name, class_name in RELEASED.items():
        parts = module_name.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        stand_in = type(class_name, (), {"__module__": module_name})
        monkeypatch.setattr(sys.modules[module_name], class_name, stand_in, raising=False)
        classes[class_name] = stand_in
    return types.SimpleNamespace(**classes)


@pytest.fixture
def write_checkpoint(released: types.SimpleNamespace) -> Callable[..., HyperNetwork]:
    """``write(path, config, edit=None, **save)``: a random network as a released checkpoint.

    ``edit`` may change the saved dictionary in place. Returns the network.
    """

    def write(
        path: Path,
        config: HypernetConfig,
        edit: Callable[[dict[str, Any]], None] | None = None,
        **save: Any,
    ) -> HyperNetwork:
        torch.manual_seed(0)
        network = HyperNetwork(config)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(torch.randn_like(parameter))
        state = OrderedDict(network.state_dict())
        names = list(config.target_modules)
        aggregator = released.AggregatorConfig()
        vars(aggregator).update(
            aggregator_type="perceiver",
            num_layers=config.num_layers,
            num_modules=len(names),
            num_extra_modules=0,
            output_size=config.latent_size,
            feature_size=config.hidden_size,
            pooling_type="mean",
            num_latent_factor=8,
            lora_r=config.rank,
            per_rank_gen=True,
            n_latent_queries=config.num_latents,
            num_blocks=config.num_blocks,
            num_self_attn_per_block=config.num_self_attn_per_block,
            shared_weights=config.shared_weights,
            layer_to_layer_ctx_encoder=True,
        )
        hypernet = released.HypernetConfig()
        vars(hypernet).update(
            latent_size=config.latent_size,
            use_light_weight_lora=False,
            light_weight_latent_size=128,
            per_rank_gen=True,
            use_per_rank_bias=False,
            use_bias=True,
            per_layer_processing=False,
            use_token_mixing=False,
            num_pre_head_layers=config.num_pre_head_layers,
            dropout_rate=0.0,
            lora_config=LoraConfig(
                task_type=TaskType.CAUSAL_LM,
                r=config.rank,
                lora_alpha=config.scale,
                target_modules=names[::-1],
                base_model_name_or_path=config.base_model_name_or_path,
            ),
            extra_modules=None,
            base_hidden_size=config.hidden_size,
            layer_indices=torch.arange(config.num_layers),
            feature_sizes=tuple(
                {name: sizes[side] for name, sizes in config.target_modules.items()}
                for side in (0, 1)
            ),
            aggregator_config=aggregator,
        )
        encoder = released.CtxEncoderArguments()
        vars(encoder).update(ctx_encoder_type="per_layer_activations", layer_idx=None)
        state["base_model_name_or_path"] = config.base_model_name_or_path
        state["hypernet_config"] = hypernet
        state["ctx_encoder_args"] = encoder
        if edit is not None:
            edit(state)
        torch.save(state, path, **save)
        return network

    return write


@pytest.fixture
def tiny_config() -> HypernetConfig:
    return HypernetConfig(
        hidden_size=8,
        num_layers=2,
        target_modules={"down_proj": (12, 8)},
        rank=2,
        latent_size=4,
        num_latents=3,
        num_blocks=1,
        base_model_name_or_path="tiny/base",
    )


@pytest.fixture(scope="session")
def base_model() -> SmolVLMForConditionalGeneration:
    """A random VLM: 3 text layers, hidden 32, intermediate 48."""
    return tiny.vlm(96)
