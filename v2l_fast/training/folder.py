"""The folder of a run: what lies where, starting over, and one run at a time.

Several processes of one run share it, on one machine or over a file system that all machines mount:
all read its checkpoints and list broken videos in it, the first one writes the rest.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from v2l_fast.errors import CheckpointError
from v2l_fast.files import read_text
from v2l_fast.outputs import check_folder
from v2l_fast.training.checkpoint import latest_checkpoint, read_progress
from v2l_fast.training.records import cut_lines


class RunFolder:
    """Paths of a run's files.

    Args:
        path: the folder, made when it is opened.
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
        """Take the folder for this run; remove what a run that starts over would contradict.

        resume: True needs a checkpoint, False starts over, None continues where there is one.

        Raises:
            CheckpointError: another run writes here, there is nothing to resume, or the folder
                holds files that are not a run's.
            WriteError: the folder cannot be written.
        """
        files = (
            self.log, self.samples, self.quarantine, self.val_quarantine, self.summary
        )  # fmt: skip
        if not self._lock_path.exists():
            # Starting over removes these files: they must be a run's.
            check_folder(self.path)
            foreign = next((file for file in files if file.exists()), None)
            if foreign is not None:
                raise CheckpointError(
                    f"{self.path}: holds {foreign.name}, but not of a run; name another run.folder"
                )
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._lock = open(self._lock_path, "a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(
                f"{self.path}: another run is writing here; wait for it or name another run.folder"
            ) from None
        # What the other processes know it by.
        self._lock.truncate(0)
        self._lock.write(uuid.uuid4().hex)
        self._lock.flush()
        os.fsync(self._lock.fileno())
        for folder in (self.path, self.checkpoints):
            for part in folder.glob(".*.part"):
                part.unlink()
        found = self.latest()
        if resume and found is None:
            raise CheckpointError(f"{self.path}: no checkpoint to resume; leave out --resume")
        if found is not None and resume is not False:
            step = read_progress(found)["step"]
            for lines in (self.log, self.samples, self.quarantine):
                cut_lines(lines, step)
            return
        for path in self.checkpoints.glob("step-*.safetensors"):
            path.unlink()
        for path in files:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.best, ignore_errors=True)

    def refuse_another(self, gather: Callable[[tuple[str, ...]], list[tuple[str, ...]]]) -> None:
        """All processes look whether they see what the first one has opened before.

        gather: a value to the list of every process's, in order of rank.

        Raises:
            CheckpointError: in every process, naming the machines that see something else.
        """
        latest = self.latest()
        mark = read_text(self._lock_path) if self._lock_path.is_file() else ""
        seen = gather((socket.gethostname(), mark, latest.name if latest else ""))
        first, *opened = seen[0]
        strangers = sorted({host for host, *other in seen if other != opened})
        if strangers:
            raise CheckpointError(
                f"{self.path}: on {', '.join(strangers)} this is not the folder that the first "
                f"process opened on {first}; name a run.folder on a file system that all "
                "machines of the run share, by its full path"
            )

    def close(self) -> None:
        """Let another run have it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def latest(self) -> Path | None:
        """The checkpoint of the highest step."""
        return latest_checkpoint(self.checkpoints)
