"""Shared pieces of the training tests: the shapes world's untrained model."""

import pytest
import torch

from v2l_fast.backbones.smolvlm import SmolVLM
from v2l_fast.shapes.base import new_base
from v2l_fast.shapes.prompts import Prompts


@pytest.fixture
def base():
    """An untrained backbone with weights large enough for answers to depend on the input."""
    model, tokenizer = new_base(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return SmolVLM(model, tokenizer, "untrained")


@pytest.fixture
def prompts(base):
    return Prompts(base.tokenizer)
