"""Frozen VLMs: everything that differs between families, behind one interface.

:func:`load_backbone` loads one with the class of its family.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import AutoConfig

from v2l_fast.errors import CheckpointError
from v2l_fast.files import open_regular, read_json
from v2l_fast.loading import brief_hub, hub_reason
from v2l_fast.tensor_files import read_header
from v2l_fast.vlm.base import (
    Backbone,
    Message,
    Prompt,
    PromptBuilder,
    Question,
    VideoChunk,
    iter_views,
)
from v2l_fast.vlm.smolvlm import SmolVLM

__all__ = [
    "Backbone",
    "Message",
    "Prompt",
    "PromptBuilder",
    "Question",
    "VideoChunk",
    "iter_views",
    "load_backbone",
]

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
    if not os.path.exists(name_or_path):
        with brief_hub():
            return _load(name_or_path, device, dtype)
    if os.path.isdir(name_or_path):
        _check_folder(Path(name_or_path))
    return _load(name_or_path, device, dtype)


def _load(
    name_or_path: str | os.PathLike, device: str | torch.device, dtype: torch.dtype
) -> Backbone:
    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except Exception as error:
        # transformers raises a dozen unrelated types for values of other types than it expects.
        local = os.path.exists(name_or_path)
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        reason = reason if local else hub_reason(error)
        raise CheckpointError(
            f"{name_or_path}: cannot read the base model's config ({reason}); "
            "give a folder with config.json or a model id you have access to"
        ) from None
    if torch.device(device).type == "cuda":
        # PyTorch prefers cuDNN's attention on Hopper, which builds a plan for every new length, and
        # every prompt has one.
        torch.backends.cuda.enable_cudnn_sdp(False)
    family = FAMILIES.get(str(config.model_type))
    if family is None:
        raise CheckpointError(
            f"{name_or_path}: model type {config.model_type!r} is not supported; "
            f"supported: {', '.join(sorted(FAMILIES))}"
        )
    return family.from_pretrained(name_or_path, device=device, dtype=dtype)


def _check_folder(folder: Path) -> None:
    """Check the files that transformers will read, which it does without limits.

    Raises:
        CheckpointError: a file is not a regular file, a config is nested too deeply, or a header of
            weights is damaged.
    """
    remedy = "get the base model again"
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            read_header(path, CheckpointError, remedy=remedy)
        elif path.suffix in (".json", ".txt", ".model", ".jinja"):
            open_regular(path, CheckpointError).close()
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        if (folder / name).exists():
            read_json(folder / name, error=CheckpointError, kind=dict, remedy=remedy)
