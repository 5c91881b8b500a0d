"""Directories written whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from v2l_fast.errors import V2LError


@contextmanager
def whole_directory(path: str | os.PathLike, error: type[V2LError]) -> Iterator[Path]:
    """A temporary directory that takes the place of ``path`` when the block succeeds.

    An earlier export is replaced, a directory with anything else in it never: it may hold what
    the caller did not mean to lose.

    Raises:
        error: ``path`` is a file, cannot be written, or holds files that the export does not write.
    """
    # Behind a symbolic link the folder is replaced, not the link.
    path = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    part = old = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_dir():
            raise error(f"{path}: is a file; name a directory")
        unique = f".{path.name[:50]}.{uuid.uuid4().hex}"
        part = path.with_name(f"{unique}.part")
        part.mkdir()
        yield part
        if path.exists():
            foreign = sorted({f.name for f in path.iterdir()} - {f.name for f in part.iterdir()})
            if foreign:
                raise error(f"{path}: holds other files ({foreign[0]}); name an empty directory")
            old = path.with_name(f"{unique}.old")
            os.replace(path, old)
        os.replace(part, path)
    except OSError as cause:
        raise error(f"{path}: cannot be written ({cause.strerror or cause})") from None
    finally:
        if old is not None and old.exists() and not path.exists():
            os.replace(old, path)
        for leftover in (part, old):
            if leftover is not None:
                shutil.rmtree(leftover, ignore_errors=True)
