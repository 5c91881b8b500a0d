"""Shared pieces of the shapes tests."""

import pytest

from v2l_fast.shapes.vlm import Prompts, build_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def prompts(tokenizer):
    return Prompts(tokenizer)
