"""Configuration of the hypernetwork, stored with its weights as ``config.json``.

Holds the architecture and the setting it was trained in (frames, resolution, instruction), so a
video is internalized at inference as it was in training. It knows nothing about any VLM family.
Values are checked by hand: a machine that runs the network may have torch and transformers alone,
not pydantic, which the settings of training use.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from v2l_fast.errors import ConfigError, excerpt
from v2l_fast.files import read_json, write_json
from v2l_fast.video.preprocess import FrameSampling

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
MODEL_TYPE = "v2l_hypernetwork"
# Far beyond any network; building one of a billion layers would never end.
_MAX_LAYERS, _MAX_SIZE = 1024, 2**20
# Metadata of integer fields: the range of the values.
_SIZE, _EDGE = {"range": (1, _MAX_SIZE)}, {"range": (2, _MAX_SIZE)}
_COUNT, _COUNT_OR_ZERO = {"range": (1, _MAX_LAYERS)}, {"range": (0, _MAX_LAYERS)}
INSTRUCTION = "Internalize this video for later captioning."


@dataclass(frozen=True)
class HypernetConfig:
    """Architecture of a :class:`~v2l_fast.hypernet.network.HyperNetwork` and its training setting.

    Args:
        hidden_size: D, width of the VLM's decoder (the hypernetwork's input features).
        num_layers: L, number of decoder layers, one adapter each.
        target_modules: module name -> (d_in, d_out) of the adapted linear layer. Kept in sorted
            order, the order of the rank latents and of the head's columns.
        rank: R, generated rank per chunk.
        latent_size: Z, width of the latents.
        num_latents: Q, latents of the encoder.
        num_blocks: cross-attention layers of the encoder.
        num_self_attn_per_block: self-attention layers after each of them.
        shared_weights: blocks after the second reuse the second's cross-attention, all blocks the
            first's self-attention.
        num_pre_head_layers: residual MLP blocks before the head.
        shared_head: one head for all layers (the paper's Section 3.3) instead of one per layer.
        bias_adapter: a learned adapter shared by all videos, concatenated in rank.
        scale: s, the LoRA scale, used unchanged; ``2 * rank ** 1.5`` when omitted.
        num_heads, num_kv_heads, head_dim: attention of both resamplers.
        base_model_name_or_path: the frozen VLM the hypernetwork was trained for.
        chunk_position: the network reads which part of its video a chunk is.
        max_frames, longest_edge, target_fps: sampling and resolution (pixels) of training.
        instruction: the text that follows the video in the context pass.

    Raises:
        ConfigError: a value is out of range or values contradict each other.
    """

    hidden_size: int = field(metadata=_SIZE)
    num_layers: int = field(metadata=_COUNT)
    target_modules: Mapping[str, tuple[int, int]]
    rank: int = field(default=16, metadata=_SIZE)
    latent_size: int = field(default=512, metadata=_SIZE)
    num_latents: int = field(default=8, metadata=_COUNT)
    num_blocks: int = field(default=9, metadata=_COUNT)
    num_self_attn_per_block: int = field(default=0, metadata=_COUNT_OR_ZERO)
    shared_weights: bool = False
    num_pre_head_layers: int = field(default=1, metadata=_COUNT_OR_ZERO)
    shared_head: bool = False
    bias_adapter: bool = True
    scale: float | None = None
    num_heads: int = field(default=16, metadata=_COUNT)
    num_kv_heads: int = field(default=4, metadata=_COUNT)
    head_dim: int = field(default=128, metadata=_SIZE)
    chunk_position: bool = False
    base_model_name_or_path: str | None = None
    max_frames: int = field(default=12, metadata=_SIZE)
    longest_edge: int = field(default=384, metadata=_EDGE)
    target_fps: float = 1.0
    instruction: str = INSTRUCTION

    def __post_init__(self) -> None:
        def require(name: str, holds: bool, expected: str) -> None:
            if not holds:
                raise ConfigError(f"{name} must be {expected}, got {excerpt(getattr(self, name))}")

        for item in dataclasses.fields(self):
            name, value = item.name, getattr(self, item.name)
            if "range" in item.metadata:
                low, high = item.metadata["range"]
                require(name, type(value) is int and value >= low, f"an integer of at least {low}")
                require(name, value <= high, f"at most {high:,}")
            elif item.type == "bool":
                require(name, isinstance(value, bool), "true or false")
        base = self.base_model_name_or_path
        require("base_model_name_or_path", base is None or isinstance(base, str), "text")
        require("instruction", isinstance(self.instruction, str), "text")
        scale = 2.0 * self.rank**1.5 if self.scale is None else self.scale
        require("scale", _is_finite(scale), "a finite number")
        object.__setattr__(self, "scale", float(scale))
        fps = self.target_fps
        require("target_fps", _is_finite(fps) and fps > 0, "a positive number")
        multiple = f"a multiple of num_kv_heads ({self.num_kv_heads})"
        require("num_heads", self.num_heads % self.num_kv_heads == 0, multiple)
        layers = self.num_blocks * (1 + self.num_self_attn_per_block)
        if layers > _MAX_LAYERS:
            raise ConfigError(
                f"num_blocks * (1 + num_self_attn_per_block) must be at most {_MAX_LAYERS:,} "
                f"layers, got {self.num_blocks} * (1 + {self.num_self_attn_per_block})"
            )
        if not self.target_modules:
            raise ConfigError("target_modules is empty: name at least one, e.g. down_proj")
        modules = {}
        for name, sizes in sorted(self.target_modules.items()):
            pair = isinstance(sizes, list | tuple) and len(sizes) == 2
            if not pair or any(type(n) is not int or not 1 <= n <= _MAX_SIZE for n in sizes):
                raise ConfigError(
                    f"target_modules[{excerpt(name)}] must be (d_in, d_out), got {excerpt(sizes)}"
                )
            modules[name] = (sizes[0], sizes[1])
        object.__setattr__(self, "target_modules", modules)

    @property
    def sampling(self) -> FrameSampling:
        """Frames and resolution of training: the defaults for everything that reads videos."""
        return FrameSampling(self.max_frames, self.longest_edge, self.target_fps)

    @property
    def head_width(self) -> int:
        """Columns of the head: the widest module's d_in + d_out."""
        return max(d_in + d_out for d_in, d_out in self.target_modules.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; inverse of :meth:`from_dict`."""
        values = dataclasses.asdict(self)
        values["target_modules"] = {m: list(sizes) for m, sizes in self.target_modules.items()}
        # Left out when off, so that networks older than the field keep their fingerprint.
        if not self.chunk_position:
            del values["chunk_position"]
        return {"model_type": MODEL_TYPE, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HypernetConfig:
        """Build from :meth:`to_dict` output.

        Raises:
            ConfigError: another model's config, an unknown field or a missing one.
        """
        values = dict(values)
        model_type = values.pop("model_type", None)
        if model_type != MODEL_TYPE:
            raise ConfigError(f"model_type must be {MODEL_TYPE!r}, got {excerpt(model_type)}")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise ConfigError(f"unknown hypernetwork config fields: {', '.join(unknown)}")
        required = ("hidden_size", "num_layers", "target_modules")
        missing = [name for name in required if name not in values]
        if missing:
            raise ConfigError(f"hypernetwork config lacks {', '.join(missing)}")
        modules = values["target_modules"]
        if not isinstance(modules, Mapping):
            raise ConfigError("target_modules must map a module name to [d_in, d_out]")
        return cls(**values)

    def save(self, directory: str | os.PathLike) -> None:
        """Write ``config.json`` into an existing directory, atomically."""
        write_json(Path(directory) / CONFIG_NAME, self.to_dict())

    @classmethod
    def load(cls, directory: str | os.PathLike) -> HypernetConfig:
        """Read ``config.json`` of a directory.

        Raises:
            ConfigError: the file is missing, not JSON, or not a hypernetwork's config.
        """
        path = Path(directory) / CONFIG_NAME
        values = read_json(
            path, error=ConfigError, kind=dict, missing=f"is {directory} a hypernetwork?"
        )
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
