"""The kernels pass their self-checks in Triton's interpreter, where products are right."""

from __future__ import annotations

import pytest
import torch

from tests.csrc_triton.test_self_check import CHECKS


@pytest.mark.parametrize(("op", "check"), CHECKS)
def test_kernels_pass(op, check):
    assert op.wrong_elements(check, torch.float16, torch.device("cpu"), small=True) == 0
