"""The self-check of the kernels passes in Triton's interpreter, where products are right."""

from __future__ import annotations

import pytest
import torch

from csrc_triton import canary


@pytest.mark.parametrize("name", canary.CANARIES)
def test_kernels_pass(name):
    assert canary.wrong_elements(name, torch.float16, "cpu", small=True) == 0
