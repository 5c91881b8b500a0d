"""HypernetConfig: defaults, what it refuses, and its JSON form."""

from __future__ import annotations

import json

import pytest

from tests.tiny import CONFIG
from v2l_fast.errors import ConfigError
from v2l_fast.hypernet.config import HypernetConfig

REQUIRED = {"hidden_size": 8, "num_layers": 2, "target_modules": {"down_proj": (12, 8)}}


def test_defaults_are_the_released_ones():
    config = HypernetConfig(**REQUIRED)
    assert (config.rank, config.latent_size, config.num_latents, config.num_blocks) == (
        16,
        512,
        8,
        9,
    )
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (16, 4, 128)
    assert config.scale == 128.0
    assert HypernetConfig(**REQUIRED, rank=4).scale == 16.0
    assert HypernetConfig(**REQUIRED, scale=3).scale == 3.0
    assert config.instruction == "Internalize this video for later captioning."


def test_modules_are_sorted_and_the_head_is_as_wide_as_the_widest():
    config = HypernetConfig(8, 2, {"up_proj": (8, 12), "down_proj": (13, 8), "a": (1, 1)})
    assert list(config.target_modules) == ["a", "down_proj", "up_proj"]
    assert config.head_width == 21


@pytest.mark.parametrize("config", [CONFIG, HypernetConfig(**REQUIRED, bias_adapter=False)])
def test_round_trip(config, tmp_path):
    assert HypernetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config.save(tmp_path)
    assert HypernetConfig.load(tmp_path) == config
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_layers": -1}, "num_layers"),
        ({"rank": 2.0}, "rank"),
        ({"rank": True}, "rank"),
        ({"num_latents": "8"}, "num_latents"),
        ({"num_self_attn_per_block": -1}, "num_self_attn_per_block"),
        ({"num_heads": 6}, "multiple of num_kv_heads"),
        ({"target_modules": {}}, "target_modules is empty"),
        ({"target_modules": {"down_proj": (12,)}}, "d_in, d_out"),
        ({"target_modules": {"down_proj": (12, 0)}}, "d_in, d_out"),
        ({"scale": float("nan")}, "scale"),
        ({"scale": float("inf")}, "scale"),
        ({"max_frames": 0}, "max_frames"),
        ({"longest_edge": 1}, "longest_edge"),
    ],
)
def test_values_that_cannot_work(change, words):
    with pytest.raises(ConfigError, match=words) as caught:
        HypernetConfig(**{**REQUIRED, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "must hold a JSON object"),
        ('{"model_type": "llama"}', "'llama'"),
        ("{}", "model_type"),
        ('{"model_type": "v2l_hypernetwork"}', "lacks hidden_size"),
        (json.dumps({**CONFIG.to_dict(), "depth": 1}), "unknown .* depth"),
        (json.dumps({**CONFIG.to_dict(), "target_modules": 3}), "target_modules"),
        (json.dumps({**CONFIG.to_dict(), "rank": -3}), "rank"),
    ],
)
def test_files_that_are_not_a_config(text, words, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        HypernetConfig.load(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_text(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        HypernetConfig.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": {"down_proj": 3}},
        {"target_modules": {"down_proj": "ab"}},
        {"scale": "big"},
        {"target_fps": "fast"},
        {"target_fps": 0},
        {"instruction": None},
        {"shared_head": "no"},
    ],
)
def test_wrong_types_in_a_file(change, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG.to_dict(), **change}))
    with pytest.raises(ConfigError):
        HypernetConfig.load(tmp_path)
