"""Shared pieces of the training tests."""

import pytest

from v2l_fast.shapes.vlm import Prompts


@pytest.fixture
def prompts(base):
    return Prompts(base.tokenizer)
