"""Tasks that do what a crafted file may do to its reader; they replace the sandbox's own tasks.

The processes that read files import this module, so it imports little.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.waiting import LIMIT
from v2l_fast.serving import sandbox
from v2l_fast.serving.schemas import ServerLimits
from v2l_fast.video import Limits


def read_or_suffer(path: str, limits: Limits) -> tuple[dict[str, Any], torch.Tensor]:
    """Probe a file, or do the harm that it names."""
    name = Path(path).read_bytes()[:32].strip()
    if name in HARM:
        if HARM[name] in (hang, slowly):
            Path(f"{path}.{os.getpid()}.begun").touch()
        HARM[name]()
    return sandbox._probe(path, limits)


def load_forever(path: str, limits: Limits, *options: object) -> None:
    """Instead of decoding a file: leave a marker, and never end."""
    Path(f"{path}.{os.getpid()}.begun").touch()
    slowly()


def read_forever(folder: Path, harms: list[bytes], stop: Event) -> None:
    """A program that reads files which never end, until ``stop`` is set."""
    sandbox._probe = read_or_suffer
    decoder = SimpleNamespace(device=torch.device("cpu"))
    model = SimpleNamespace(config=None, backbone=SimpleNamespace(decoder=decoder))
    reader = sandbox.VideoReader(model, ServerLimits(probe_seconds=10 * LIMIT))
    for number, harm in enumerate(harms):
        path = folder / str(number)
        path.write_bytes(harm)
        threading.Thread(target=reader.probe, args=(path,), daemon=True).start()
    stop.wait()


def abort() -> None:
    os.abort()


def read_nowhere() -> None:
    ctypes.string_at(0)


def hang() -> None:
    # The interpreter's lock is held, as native code may: no Python thread could end this.
    ctypes.PyDLL(None).sleep(100_000)


def take_memory() -> None:
    bytearray(3 << 30)


def take_tensor_memory() -> None:
    torch.zeros(3 << 30, dtype=torch.uint8)


def leave() -> None:
    os._exit(0)


def slowly() -> None:
    time.sleep(100_000)


HARM = {
    b"abort": abort, b"segfault": read_nowhere, b"hang": hang, b"memory": take_memory,
    b"tensor": take_tensor_memory, b"exit": leave, b"slow": slowly,
}  # fmt: skip
