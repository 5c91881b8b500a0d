"""Choice of the backbone class by the model's own configuration."""

from __future__ import annotations

import os

import torch
from transformers import AutoConfig

from v2l_fast.backbones.base import Backbone
from v2l_fast.backbones.smolvlm import SmolVLM
from v2l_fast.errors import CheckpointError

FAMILIES = {"smolvlm": SmolVLM}


def load_backbone(
    name_or_path: str | os.PathLike,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Backbone:
    """Load a frozen VLM by path or hub id.

    Raises:
        CheckpointError: it cannot be read, or its family is not supported.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{name_or_path}: cannot read the base model's config ({reason}); "
            "give a folder with config.json or a model id you have access to"
        ) from None
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise CheckpointError(
            f"{name_or_path}: model type {config.model_type!r} is not supported; "
            f"supported: {', '.join(sorted(FAMILIES))}"
        )
    return family.from_pretrained(name_or_path, device=device, dtype=dtype)
