"""Atomic training checkpoints in one safetensors file: parameters, optimizer state, progress.

Responsible for exact round trips, for never leaving half a file and for refusing to continue under
other settings. What progress means (step, settings) is the caller's JSON. No pickle is read or
written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from v2l_fast.errors import CheckpointError
from v2l_fast.files import parse_json
from v2l_fast.outputs import save_tensors
from v2l_fast.tensor_files import TensorHeader, load_tensors, read_header

_RNG = "rng.torch"
_PROGRESS = "progress"
_BEFORE = "delete it to continue from the one before"


def save_checkpoint(
    path: str | Path,
    parameters: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
) -> None:
    """Write parameters, the optimizer's per-parameter tensors, torch's CPU RNG and `progress`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": value for name, value in parameters.items()}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value)
    tensors[_RNG] = torch.get_rng_state()
    save_tensors(tensors, path, {_PROGRESS: json.dumps(progress)})


def read_progress(path: str | Path) -> dict[str, Any]:
    """The progress of a checkpoint, without its tensors.

    Raises CheckpointError when the file is broken.
    """
    return _progress(read_header(path, CheckpointError, remedy=_BEFORE).metadata, path)


def _progress(metadata: Mapping[str, str], path: str | Path) -> dict[str, Any]:
    if _PROGRESS not in metadata:
        raise CheckpointError(f"{path}: not a whole training checkpoint; {_BEFORE}")
    where = f"{path}: progress"
    text = metadata[_PROGRESS]
    progress = parse_json(text, where, CheckpointError, remedy=_BEFORE, allow_nan=True)
    if not isinstance(progress, dict) or type(progress.get("step")) is not int:
        raise CheckpointError(f"{where} must be an object with a step; {_BEFORE}")
    return progress


def refuse_other_settings(path: str | Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Compare flat settings, JSON-ready, of a checkpoint and of now.

    Raises CheckpointError naming the first difference and how many more there are.
    """
    current = json.loads(json.dumps(current))
    changed = [k for k in sorted({*saved, *current}) if saved.get(k) != current.get(k)]
    if changed:
        key = changed[0]
        more = f" (and {len(changed) - 1} more settings differ)" if len(changed) > 1 else ""
        raise CheckpointError(
            f"{path}: made with {key}={json.dumps(saved.get(key))}, now it is "
            f"{json.dumps(current.get(key))}{more}; set it back, name another run.folder, or "
            "start over with --fresh"
        )


def load_checkpoint(
    path: str | Path, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore into `parameters` (in place), `optimizer` and torch's RNG; returns the progress.

    Raises CheckpointError when the file is broken or belongs to another model.
    """
    tensors, metadata = load_tensors(
        path,
        CheckpointError,
        judge=lambda header: _check_layout(header, parameters, path),
        remedy=_BEFORE,
    )
    progress, rng = _progress(metadata, path), tensors[_RNG]
    saved = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(saved[name])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    torch.set_rng_state(rng)
    return progress


def _check_layout(header: TensorHeader, parameters: Mapping[str, Tensor], path: str | Path) -> None:
    """Raises CheckpointError where the tensors are none of this model's training."""
    shapes = {name: info.shape for name, info in header.tensors.items()}
    rng = header.tensors.get(_RNG)
    others = [
        name
        for name in shapes
        if name != _RNG
        and not name.startswith("model.")
        and not re.fullmatch(r"optimizer\.[0-9]{1,9}\.[^.]+", name)
    ]
    if rng is None or rng.dtype != torch.uint8 or len(rng.shape) != 1 or others:
        raise CheckpointError(f"{path}: not a whole training checkpoint; {_BEFORE}")
    saved = {n.removeprefix("model."): s for n, s in shapes.items() if n.startswith("model.")}
    if saved != {name: tuple(value.shape) for name, value in parameters.items()}:
        raise CheckpointError(f"{path}: its tensors are not this model's; train in another folder")


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of the highest step that `rotate_checkpoints` knows, or None."""
    found = sorted(Path(folder).glob("step-*.safetensors"))
    return found[-1] if found else None


def checkpoint_path(folder: str | Path, step: int) -> Path:
    """Where the checkpoint of a step lies; names sort by step."""
    return Path(folder) / f"step-{step:08d}.safetensors"


def rotate_checkpoints(folder: str | Path, keep: int) -> None:
    """Delete all but the `keep` checkpoints of the highest steps."""
    for old in sorted(Path(folder).glob("step-*.safetensors"))[:-keep]:
        old.unlink()


def named_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters by name (each tied one once)."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
