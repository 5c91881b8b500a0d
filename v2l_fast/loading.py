"""Where the weights of a name come from: shipped pairs, folders, released files, the hub."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from v2l_fast.errors import CheckpointError
from v2l_fast.files import read_json
from v2l_fast.hypernet.config import CONFIG_NAME, HypernetConfig
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.interop import frames2lora
from v2l_fast.video import FrameSampling

ASSETS = Path(__file__).parent / "assets"
# Frames and pixels of the paper's training (Table 6).
PAPER = FrameSampling(max_frames=12, longest_edge=384)


def shipped(name: str | os.PathLike, part: str) -> Path | None:
    """Folder of a pair that comes with the package, unless a local path has that name."""
    folder = ASSETS / str(name) / part
    return folder if not Path(name).exists() and folder.is_dir() else None


def recorded_name(name_or_path: str | os.PathLike) -> str:
    """What records call a model: a shipped one by its pair's name, wherever the package lies."""
    path = Path(name_or_path)
    return path.parent.name if path.is_relative_to(ASSETS) else str(name_or_path)


def load_hypernet(name_or_path: str | os.PathLike) -> tuple[HyperNetwork, Path | None]:
    """The hypernetwork (on the CPU) and the base model next to it, if there is one."""
    path = Path(name_or_path)
    packaged = shipped(name_or_path, "hypernet")
    if packaged is not None:
        # A network without a base of its own names that of another shipped pair.
        return HyperNetwork.from_pretrained(packaged), shipped(name_or_path, "base")
    if path.is_file():
        return frames2lora.load(path), None
    if not path.exists():
        path = _download(str(name_or_path))
    if (path / "hypernet" / CONFIG_NAME).is_file():
        base = path / "base"
        return HyperNetwork.from_pretrained(path / "hypernet"), base if base.is_dir() else None
    return HyperNetwork.from_pretrained(path), None


def training_sampling(base: str | os.PathLike) -> FrameSampling:
    """Frames and resolution that hypernetworks for a base model are trained with.

    They are those of the hypernetwork next to the base, as in a shipped pair or in the
    folder of a run. For another base they are the paper's, in frames no larger than the base's
    own configuration says.

    Raises:
        ConfigError, CheckpointError: a configuration is broken.
    """
    beside = shipped(base, "hypernet") or Path(base).resolve().parent / "hypernet"
    if (beside / CONFIG_NAME).is_file():
        return HypernetConfig.load(beside).sampling
    size = _preprocessor(base).get("video_sampling", {}).get("video_size", {}).get("longest_edge")
    edge = size if isinstance(size, int) and size > 1 else PAPER.longest_edge
    return PAPER.override(longest_edge=min(PAPER.longest_edge, edge))


def _preprocessor(base: str | os.PathLike) -> dict:
    """The configuration of a base model's frames; empty where there is none."""
    path = Path(base)
    if not path.exists():
        try:
            from huggingface_hub import hf_hub_download

            with brief_hub():
                path = Path(hf_hub_download(str(base), "preprocessor_config.json"))
        except (OSError, ValueError):
            # Loading the base reports the error.
            return {}
    else:
        path /= "preprocessor_config.json"
    return read_json(path, error=CheckpointError, kind=dict) if path.is_file() else {}


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        with brief_hub():
            return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name}: not a local path, and not found on the Hugging Face Hub "
            f"({hub_reason(error)}); give a path, a hub id, or a shipped pair, such as "
            "'shapes-any'"
        ) from None


# --- the Hugging Face Hub -------------------------------------------------------------------------

_SECONDS = 5.0


@cache
def hub_answers() -> bool:
    """Whether the hub answers a request, with any status; checked once per process.

    Without a network, its client retries every request six times, which takes 23 seconds.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    session = get_session()
    try:
        session.head(constants.ENDPOINT, timeout=_SECONDS)
    except _failures(session):
        return False
    return True


def _failures(session: object) -> tuple[type[Exception], ...]:
    """What a request raises without a name, a route, a proxy, an answer in time, or a valid URL.

    Versions of the client differ in their HTTP library: httpx and its successors have one base
    class for each, the errors of requests are OSErrors.
    """
    libraries = [sys.modules[c.__module__.partition(".")[0]] for c in type(session).__mro__]
    named = [getattr(m, name, OSError) for m in libraries for name in ("HTTPError", "InvalidURL")]
    return (OSError, *named)


@contextmanager
def brief_hub() -> Iterator[None]:
    """Read from the cache alone, without retries, while the hub cannot be reached."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not hub_answers()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def hub_reason(error: Exception) -> str:
    """Why a read of the hub failed, in one line."""
    if not hub_answers():
        return "the Hugging Face Hub does not answer, and nothing of that name is cached"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
