"""Examples about the tiny model's clips."""

from __future__ import annotations

import pytest

from v2l_fast.evaluation.examples import EvalExample
from v2l_fast.video import Clip


@pytest.fixture(scope="session")
def examples(clips: list[Clip]) -> list[EvalExample]:
    """Two questions about the first clip, one about each other."""
    return [
        EvalExample(clips[0], "what happens?", ("red circle moves left", "blue square")),
        EvalExample(clips[0], "which color is it?", ("red",)),
        EvalExample(clips[1], "what happens?", ("a green square stays",)),
        EvalExample(clips[2], "how many frames?", ("two", "2")),
    ]
