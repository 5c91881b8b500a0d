"""Fixtures of the video tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.video.clips import encode


@pytest.fixture
def clip(tmp_path) -> Callable[..., Path]:
    """Encode a clip into the test's folder: clip("name.mp4", num_frames, ...)."""

    def make(name: str, num_frames: int, **kwargs) -> Path:
        return encode(tmp_path / name, num_frames, **kwargs)

    return make
