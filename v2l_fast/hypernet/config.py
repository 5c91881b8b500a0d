"""Configuration of the hypernetwork, stored with its weights as ``config.json``.

Holds the architecture and the setting it was trained in (frames, resolution, instruction), so a
video is internalized at inference as it was in training. It knows nothing about any VLM family.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from v2l_fast.errors import ConfigError, excerpt, refusal
from v2l_fast.files import read_json, write_json
from v2l_fast.video.preprocess import FrameSampling

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
MODEL_TYPE = "v2l_hypernetwork"
INSTRUCTION = "Internalize this video for later captioning."

# Numbers are not converted from text, nor text from numbers.
STRICT = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")
# Far beyond any network; building one of a billion layers would never end.
_MAX_LAYERS, _MAX_SIZE = 1024, 2**20

T = TypeVar("T")
Size = Annotated[int, Field(ge=1, le=_MAX_SIZE)]
Count = Annotated[int, Field(ge=1, le=_MAX_LAYERS)]
CountOrZero = Annotated[int, Field(ge=0, le=_MAX_LAYERS)]
# JSON has lists only.
Pair = Annotated[tuple[Size, Size], BeforeValidator(lambda n: tuple(n) if type(n) is list else n)]


def raises_config_error(cls: type[T]) -> type[T]:
    """Let the constructor of a pydantic dataclass raise ConfigError."""
    validate = cls.__init__

    @wraps(validate)
    def __init__(self: T, *args: Any, **values: Any) -> None:
        try:
            validate(self, *args, **values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{name} {refusal(first)}".lstrip()) from None

    cls.__init__ = __init__  # type: ignore[assignment,method-assign]
    return cls


@raises_config_error
@dataclass(frozen=True, config=STRICT)
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

    hidden_size: Size
    num_layers: Count
    target_modules: Annotated[Mapping[str, Pair], Field(min_length=1)]
    rank: Size = 16
    latent_size: Size = 512
    num_latents: Count = 8
    num_blocks: Count = 9
    num_self_attn_per_block: CountOrZero = 0
    shared_weights: bool = False
    num_pre_head_layers: CountOrZero = 1
    shared_head: bool = False
    bias_adapter: bool = True
    scale: float | None = None
    num_heads: Count = 16
    num_kv_heads: Count = 4
    head_dim: Size = 128
    chunk_position: bool = False
    base_model_name_or_path: str | None = None
    max_frames: Size = 12
    longest_edge: Annotated[Size, Field(ge=2)] = 384
    target_fps: Annotated[float, Field(gt=0)] = 1.0
    instruction: str = INSTRUCTION

    def __post_init__(self) -> None:
        modules = dict(sorted(self.target_modules.items()))
        object.__setattr__(self, "target_modules", modules)
        if self.scale is None:
            object.__setattr__(self, "scale", 2.0 * self.rank**1.5)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads must be a multiple of num_kv_heads ({self.num_kv_heads}), "
                f"got {self.num_heads}"
            )
        if self.num_blocks * (1 + self.num_self_attn_per_block) > _MAX_LAYERS:
            raise ConfigError(
                f"num_blocks * (1 + num_self_attn_per_block) must be at most {_MAX_LAYERS:,} "
                f"layers, got {self.num_blocks} * (1 + {self.num_self_attn_per_block})"
            )

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
        values = asdict(self)
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
