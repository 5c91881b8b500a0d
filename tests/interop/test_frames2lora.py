"""Released checkpoints: exact weights, every refusal by name, conversion."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from v2l_fast.errors import CheckpointError, ConfigError
from v2l_fast.hypernet.config import HypernetConfig
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.interop import convert, load


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and message.isprintable()
    return message


def assert_same(network: HyperNetwork, state: dict[str, torch.Tensor]) -> None:
    actual = network.state_dict()
    assert actual.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(actual[key], value) and actual[key].dtype == torch.float32, key


@pytest.mark.parametrize(
    "name", ["nano", "nano_cuda_tagged", "nano_orig_mod_prefix", "nano_legacy_format", "nano_bf16"]
)
def test_released_files_give_exact_weights(data: Path, name: str) -> None:
    state = load_file(data / "nano_state.safetensors")
    if name == "nano_bf16":
        state = {key: value.bfloat16().float() for key, value in state.items()}
    network = load(data / f"{name}.pt")
    assert_same(network, state)
    assert network.config == HypernetConfig(
        hidden_size=16,
        num_layers=2,
        target_modules={"down_proj": (24, 16)},
        rank=2,
        latent_size=8,
        num_latents=3,
        num_blocks=1,
        scale=5.656854249492381,
        base_model_name_or_path="tiny-random/SmolVLM-nano",
    )
    assert not network.training and all(p.requires_grad for p in network.parameters())


VARIANTS = {
    "modules": {"target_modules": {"o_proj": (8, 8), "down_proj": (12, 8)}},
    "self attention": {"num_blocks": 2, "num_self_attn_per_block": 2},
    "shared": {"num_blocks": 3, "num_self_attn_per_block": 1, "shared_weights": True},
    "shared single block": {"num_self_attn_per_block": 1, "shared_weights": True},
    "no pre-head": {"num_pre_head_layers": 0, "rank": 1, "num_latents": 1},
    "three pre-head": {"num_pre_head_layers": 3, "scale": 7.5, "num_layers": 5},
}


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS.keys())
def test_other_shapes(
    write_checkpoint: Callable, tiny_config: HypernetConfig, tmp_path: Path, change: dict
) -> None:
    config = replace(tiny_config, **change)
    truth = write_checkpoint(tmp_path / "x.pt", config)
    network = load(tmp_path / "x.pt")
    assert network.config == config
    assert_same(network, dict(truth.state_dict()))
    features = torch.randn(1, config.num_layers, 4, config.hidden_size)
    with torch.no_grad():
        ours, expected = network(features), truth(features)
    for module in config.target_modules:
        assert torch.equal(ours.A[module], expected.A[module])


@pytest.mark.parametrize("protocol", [4, 5])
def test_other_pickle_protocols(
    write_checkpoint: Callable, tiny_config: HypernetConfig, tmp_path: Path, protocol: int
) -> None:
    write_checkpoint(tmp_path / "x.pt", tiny_config, pickle_protocol=protocol)
    assert "only protocol 2" in refused(tmp_path / "x.pt")


def field(owner: str, name: str, value: object) -> Callable[[dict], None]:
    def edit(saved: dict) -> None:
        config = saved["hypernet_config"]
        target = config if not owner else vars(config)[owner]
        vars(target)[name] = value

    return edit


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        ("", "per_layer_processing", True),
        ("", "use_token_mixing", True),
        ("", "use_light_weight_lora", True),
        ("", "per_rank_gen", False),
        ("", "extra_modules", ["layernorm"]),
        ("", "layer_indices", torch.tensor([0, 2])),
        ("", "layer_indices", torch.tensor([0.0, 1.0])),
        ("", "feature_sizes", ({}, {})),
        ("", "feature_sizes", ({"down_proj": 1 << 40}, {"down_proj": 8})),
        ("", "latent_size", -4),
        ("", "latent_size", 1 << 40),
        ("", "latent_size", True),
        ("", "num_pre_head_layers", 100_000),
        ("", "num_pre_head_layers", "1"),
        ("", "lora_config", None),
        ("aggregator_config", "aggregator_type", "pooler"),
        ("aggregator_config", "layer_to_layer_ctx_encoder", False),
        ("aggregator_config", "num_extra_modules", 2),
        ("aggregator_config", "num_blocks", 0),
        ("aggregator_config", "num_blocks", None),
        ("aggregator_config", "num_blocks", 100_000),
        ("aggregator_config", "lora_r", 3),
        ("aggregator_config", "num_layers", 3),
        ("aggregator_config", "num_modules", 2),
        ("aggregator_config", "output_size", 8),
        ("aggregator_config", "shared_weights", 1),
        ("lora_config", "target_modules", {"no\nname"}),
        ("lora_config", "target_modules", {"keys"}),
        ("lora_config", "target_modules", "all-linear"),
        ("lora_config", "target_modules", set()),
        ("lora_config", "lora_alpha", float("nan")),
        ("lora_config", "lora_alpha", 10**400),
        ("lora_config", "r", 0),
    ],
)
def test_unsupported_and_inconsistent_configs_are_named(
    write_checkpoint: Callable,
    tiny_config: HypernetConfig,
    tmp_path: Path,
    owner: str,
    name: str,
    value: object,
) -> None:
    path = tmp_path / "x.pt"
    write_checkpoint(path, tiny_config, field(owner, name, value))
    message = refused(path)
    if name not in ("num_pre_head_layers", "num_blocks", "lora_alpha", "r"):
        assert name in message


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda s: s.pop("head.weight"), "lacks 'head.weight'"),
        (lambda s: s.update(surprise=torch.ones(1)), "unexpected 'surprise'"),
        (lambda s: s.update({"bad\nkey": torch.ones(1)}), "not a parameter name"),
        (lambda s: s.update(note="text"), "'note' is 'text', not a tensor"),
        (lambda s: s.update({"head.weight": torch.ones(2, 4, 19)}), "head.weight is [2, 4, 19]"),
        (lambda s: s.update({"head.weight": s["head.weight"].int()}), "head.weight is torch.int32"),
        (lambda s: s["head.weight"].fill_(torch.inf), "head.weight holds NaN or infinity"),
        (lambda s: s.update({"_orig_mod.head.weight": s["head.weight"]}), "there twice"),
        (lambda s: s.pop("hypernet_config"), "hypernet_config"),
        (lambda s: s.update(hypernet_config={}), "hypernet_config"),
        (
            lambda s: s.update(base_model_name_or_path=7),
            "base_model_name_or_path must be text",
        ),
    ],
)
def test_broken_weights_are_named(
    write_checkpoint: Callable,
    tiny_config: HypernetConfig,
    tmp_path: Path,
    edit: Callable,
    says: str,
) -> None:
    path = tmp_path / "x.pt"
    write_checkpoint(path, tiny_config, edit)
    assert says in refused(path)


def test_unknown_object_in_config_is_refused(
    write_checkpoint: Callable,
    tiny_config: HypernetConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)

    class Payload:
        def __reduce__(self) -> tuple:
            return exec, ("open('PWNED', 'w')",)

    path = tmp_path / "x.pt"
    for zipped in (True, False):
        write_checkpoint(
            path,
            tiny_config,
            field("lora_config", "runtime_config", Payload()),
            _use_new_zipfile_serialization=zipped,
        )
        assert "exec" in refused(path)
    assert not (tmp_path / "PWNED").exists()


def test_parameters_over_one_storage_are_refused(
    write_checkpoint: Callable, tiny_config: HypernetConfig, tmp_path: Path
) -> None:
    """Views of one storage cost the file nothing, and the network a copy each."""

    def overlap(saved: dict) -> None:
        memory = torch.ones(10_000)
        for key, value in saved.items():
            if isinstance(value, torch.Tensor):
                saved[key] = memory[: value.numel()].view(value.shape)

    path = tmp_path / "x.pt"
    write_checkpoint(path, tiny_config, overlap)
    assert "overlap" in refused(path)


def test_shared_layers_must_agree(
    write_checkpoint: Callable, tiny_config: HypernetConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, num_blocks=3, shared_weights=True)
    key = "aggregator.perceiver.encoder.layers.2.self_attn.q_proj.weight"
    path = tmp_path / "x.pt"
    write_checkpoint(path, config, lambda s: s.update({key: s[key].clone()}))
    load(path)
    write_checkpoint(path, config, lambda s: s.update({key: s[key] + 1}))
    assert key in refused(path)


@settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    edits=st.lists(st.tuples(st.integers(-8000, 12_000), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 300),
)
def test_damaged_files_are_read_or_refused(
    data: Path, tmp_path: Path, edits: list[tuple[int, int]], cut: int
) -> None:
    """Damage to the pickle, the headers and the directory at the end."""
    content = bytearray((data / "nano.pt").read_bytes())
    for position, value in edits:
        content[position] = value
    path = tmp_path / "x.pt"
    path.write_bytes(content[: len(content) - max(0, cut - 200)])
    try:
        load(path)
    except CheckpointError as error:
        assert str(error).isprintable()


def test_use_bias_off_drops_the_bias(
    write_checkpoint: Callable, tiny_config: HypernetConfig, tmp_path: Path
) -> None:
    path = tmp_path / "x.pt"
    write_checkpoint(path, tiny_config, field("", "use_bias", False))
    network = load(path)
    assert not network.config.bias_adapter and network.bias_adapter() is None


def test_older_checkpoints_without_fields(
    write_checkpoint: Callable, tiny_config: HypernetConfig, tmp_path: Path
) -> None:
    """The released loader assumes four pre-head blocks and a bias when the fields are absent."""

    def older(saved: dict) -> None:
        for name in ("num_pre_head_layers", "use_bias", "use_per_rank_bias"):
            del vars(saved["hypernet_config"])[name]

    path = tmp_path / "x.pt"
    write_checkpoint(path, replace(tiny_config, num_pre_head_layers=4), older)
    config = load(path).config
    assert config.num_pre_head_layers == 4 and config.bias_adapter


def test_convert_round_trip(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    convert(data / "nano_legacy_format.pt", out)
    assert sorted(f.name for f in out.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(load(out), load_file(data / "nano_state.safetensors"))
    assert json.loads((out / "config.json").read_text())["rank"] == 2
    convert(data / "nano_bf16.pt", out)
    assert load(out).head.weight.equal(load(data / "nano_bf16.pt").head.weight)
    assert [f.name for f in out.parent.iterdir()] == ["out"]


def test_failed_convert_leaves_nothing(data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pt"
    broken.write_bytes((data / "nano.pt").read_bytes()[:-1000])
    with pytest.raises(CheckpointError):
        convert(broken, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="notes.txt"):
        convert(data / "nano.pt", tmp_path / "mine")
    with pytest.raises(CheckpointError, match="is a file"):
        convert(data / "nano.pt", broken)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["broken.pt", "mine"]
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="config.json"):
        load(tmp_path)
