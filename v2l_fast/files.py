"""Files on disk: atomic writes, and safetensors reads whose errors name file and remedy."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from v2l_fast.errors import V2LError


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Write the yielded file, and ``path`` becomes it when the block ends, never a part of it.

    The file is on the disk before it takes its place; when the block raises, it is removed.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield part
        with open(part, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file (UTF-8) so that ``path`` is either the old file or the whole new one.

    Raises:
        V2LError: its folder does not exist, is not writable, or the disk is full.
    """
    try:
        with replacing(path) as part:
            part.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise V2LError(f"{path}: cannot be written ({error.strerror})") from None


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file so that ``path`` is either the old file or the whole new one.

    Raises:
        V2LError: its folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise V2LError(f"{path}: there is no folder {path.parent}; make it first")
    # Clones of views and of tensors that share storage (shared weights) are independent.
    ready = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    with replacing(path) as part:
        # save_file makes its file private; adapters and weights follow the user's umask.
        part.touch()
        mode = part.stat().st_mode
        save_file(ready, part, metadata={"format": "pt", **(metadata or {})})
        os.chmod(part, mode)


def load_tensors(
    path: str | os.PathLike, error: type[V2LError]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and metadata of a safetensors file.

    Raises:
        error: the file is missing or not a whole safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise error(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.offset_keys()}
            return tensors, handle.metadata() or {}
    except (SafetensorError, OSError) as cause:
        raise error(f"{path}: not a whole safetensors file ({cause}); make it again") from None
