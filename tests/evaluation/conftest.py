"""Examples about the tiny model's clips."""

from __future__ import annotations

import pytest

from v2l_fast.evaluation.examples import Example
from v2l_fast.video import Clip


@pytest.fixture(scope="session")
def examples(clips: list[Clip]) -> list[Example]:
    """Two questions about the first clip, one about each other."""
    return [
        Example(clips[0], "what happens?", ("red circle moves left", "blue square")),
        Example(clips[0], "which color is it?", ("red",)),
        Example(clips[1], "what happens?", ("a green square stays",)),
        Example(clips[2], "how many frames?", ("two", "2")),
    ]
