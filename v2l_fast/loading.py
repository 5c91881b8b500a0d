"""Where a hypernetwork and its base are found: shipped pairs, folders, released files, the hub."""

from __future__ import annotations

import os
from pathlib import Path

from v2l_fast.config import CONFIG_NAME
from v2l_fast.errors import CheckpointError
from v2l_fast.hypernet import HyperNetwork

ASSETS = Path(__file__).parent / "assets"


def shipped(name: str | os.PathLike, part: str) -> Path | None:
    """Folder of a pair that comes with the package, unless a local path has that name."""
    folder = ASSETS / str(name) / part
    return folder if not Path(name).exists() and folder.is_dir() else None


def recorded_name(name_or_path: str | os.PathLike) -> str:
    """What records call a model: a shipped one by its pair's name, wherever the package lies."""
    path = Path(name_or_path)
    return path.parent.name if path.is_relative_to(ASSETS) else str(name_or_path)


def load_hypernet(name_or_path: str | os.PathLike) -> tuple[HyperNetwork, Path | None]:
    """The hypernetwork (on the CPU) and the base model that lies beside it, if one does."""
    path = Path(name_or_path)
    packaged = shipped(name_or_path, "hypernet")
    if packaged is not None:
        # A network without a base of its own names that of another shipped pair.
        return HyperNetwork.from_pretrained(packaged), shipped(name_or_path, "base")
    if path.is_file():
        # Released checkpoints are read by a layer above this one; only here is it needed.
        from v2l_fast.interop.frames2lora import load

        return load(path), None
    if not path.exists():
        path = _download(str(name_or_path))
    if (path / "hypernet" / CONFIG_NAME).is_file():
        base = path / "base"
        return HyperNetwork.from_pretrained(path / "hypernet"), base if base.is_dir() else None
    return HyperNetwork.from_pretrained(path), None


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{name}: no such folder or file, and not to be had from the hub ({reason}); "
            "give a path, a hub id, or the shipped 'shapes' or 'shapes-chunks'"
        ) from None
