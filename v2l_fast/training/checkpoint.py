"""Atomic training checkpoints in one safetensors file, and the folder of a run.

A checkpoint holds parameters, optimizer state and progress, restores them exactly and is never half
written; no pickle is read or written. `RunFolder` names the files of a run, starts over, and keeps
a second run out. All processes of a run share the folder, on one machine or over a file system that
every machine mounts; the main process writes everything but the list of broken videos.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from v2l_fast.errors import CheckpointError
from v2l_fast.files import drop_torn_line, parse_json, read_jsonl, read_text, write_jsonl
from v2l_fast.outputs import check_fingerprint, check_folder
from v2l_fast.tensor_files import TensorHeader, load_tensors, read_header, save_tensors

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

    Raises:
        CheckpointError: the file is broken.
    """
    return _progress(read_header(path, CheckpointError, remedy=_BEFORE).metadata, path)


def _progress(metadata: Mapping[str, str], path: str | Path) -> dict[str, Any]:
    if _PROGRESS not in metadata:
        raise CheckpointError(f"{path}: not a complete training checkpoint; {_BEFORE}")
    where = f"{path}: progress"
    text = metadata[_PROGRESS]
    progress = parse_json(text, where, CheckpointError, remedy=_BEFORE, allow_nan=True)
    if not isinstance(progress, dict) or type(progress.get("step")) is not int:
        raise CheckpointError(f"{where} must be an object with a step; {_BEFORE}")
    return progress


def refuse_other_settings(
    path: str | Path, saved: Mapping[str, Any], current: Mapping[str, Any]
) -> None:
    """Compare the settings of a checkpoint with those of this run.

    Raises:
        CheckpointError: they differ; names the first difference and the number of others.
    """
    remedy = "set it back, name another run.folder, or start over with --fresh"
    check_fingerprint(path, saved, current, CheckpointError, remedy)


def load_checkpoint(
    path: str | Path, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore `parameters` (in place), `optimizer` and torch's CPU RNG; returns the progress.

    Raises:
        CheckpointError: the file is broken or belongs to another model.
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
    """Raises CheckpointError unless the tensors are a training state of this model."""
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
        raise CheckpointError(f"{path}: not a complete training checkpoint; {_BEFORE}")
    saved = {n.removeprefix("model."): s for n, s in shapes.items() if n.startswith("model.")}
    if saved != {name: tuple(value.shape) for name, value in parameters.items()}:
        raise CheckpointError(f"{path}: its tensors are of another model; name another run.folder")


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of the highest step in a folder, or None."""
    return max(Path(folder).glob("step-*.safetensors"), default=None)


def checkpoint_path(folder: str | Path, step: int) -> Path:
    """The file of a step's checkpoint; names sort by step."""
    return Path(folder) / f"step-{step:08d}.safetensors"


def rotate_checkpoints(folder: str | Path, keep: int) -> None:
    """Delete all but the `keep` checkpoints of the highest steps."""
    for old in sorted(Path(folder).glob("step-*.safetensors"))[:-keep]:
        old.unlink()


def named_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters by name; tied parameters appear once."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


class RunFolder:
    """The folder of a run: the paths of its files, and a lock that keeps other runs out.

    Args:
        path: created by :meth:`open`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.hypernet = self.path / "hypernet"
        self.best = self.path / "best"
        self.best_record = self.best / "validation.json"
        self.summary = self.path / "summary.json"
        self.log = self.path / "log.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.quarantine = self.path / "quarantine.jsonl"
        self.val_quarantine = self.path / "quarantine-val.jsonl"
        self._lock_path = self.path / ".lock"
        self._lock: TextIO | None = None

    def open(self, resume: bool | None) -> None:
        """Lock the folder for this run and prepare it to continue or to start over.

        resume: True requires a checkpoint, False starts over, None continues where there is one.

        Raises:
            CheckpointError: another run writes here, there is nothing to resume, or the folder
                holds files that no run wrote.
            WriteError: the folder cannot be written.
        """
        files = (
            self.log, self.samples, self.quarantine, self.val_quarantine, self.summary
        )  # fmt: skip
        if not self._lock_path.exists():
            # Starting over removes these files, so they must be a run's.
            check_folder(self.path)
            foreign = next((file for file in files if file.exists()), None)
            if foreign is not None:
                raise CheckpointError(
                    f"{self.path}: holds a {foreign.name} that no run wrote; name another "
                    "run.folder"
                )
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._lock = open(self._lock_path, "a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(
                f"{self.path}: another run is writing here; wait for it or name another run.folder"
            ) from None
        # The other processes recognize the folder by this mark.
        self._lock.truncate(0)
        self._lock.write(uuid.uuid4().hex)
        self._lock.flush()
        os.fsync(self._lock.fileno())
        for folder in (self.path, self.checkpoints):
            for part in folder.glob(".*.part"):
                part.unlink()
        latest = self.latest()
        if resume and latest is None:
            raise CheckpointError(f"{self.path}: no checkpoint to resume; leave out --resume")
        if latest is not None and resume is not False:
            step = read_progress(latest)["step"]
            for lines in (self.log, self.samples, self.quarantine):
                _cut_lines(lines, step)
            if self.val_quarantine.is_file():
                drop_torn_line(self.val_quarantine)
            return
        for path in self.checkpoints.glob("step-*.safetensors"):
            path.unlink()
        for path in files:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.best, ignore_errors=True)

    def refuse_another(self, gather: Callable[[tuple[str, ...]], list[tuple[str, ...]]]) -> None:
        """Check that every process sees the folder that the main process has opened.

        gather: maps a value to the list of all processes' values, in order of rank.

        Raises:
            CheckpointError: on every process, naming the machines that see another folder.
        """
        latest = self.latest()
        mark = read_text(self._lock_path) if self._lock_path.is_file() else ""
        seen = gather((socket.gethostname(), mark, latest.name if latest else ""))
        first, *opened = seen[0]
        strangers = sorted({host for host, *other in seen if other != opened})
        if strangers:
            raise CheckpointError(
                f"{self.path}: on {', '.join(strangers)} this is not the folder that the main "
                f"process opened on {first}; name a run.folder on a file system that all "
                "machines of the run share, by its full path"
            )

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def latest(self) -> Path | None:
        """The checkpoint of the highest step."""
        return latest_checkpoint(self.checkpoints)


def _cut_lines(path: Path, step: int) -> None:
    """Keep the lines up to `step`; a resumed run writes the later ones again."""
    if path.is_file():
        drop_torn_line(path)
        rows = [row for _, row in read_jsonl(path, CheckpointError, allow_nan=True)]
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(rows):
            write_jsonl(path, kept)
