"""Running a piece of code with a given ``V2L_BACKEND``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from csrc_triton.dispatch import VARIABLE


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """``V2L_BACKEND`` is ``name`` inside; not for several threads."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
