"""The check of compiled paths fails where it must."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.exc import RecompileError, Unsupported

from tests.compile.graphs import LENGTHS, assert_one_graph, ramp

CASES = [(ramp(length),) for length in LENGTHS]


def test_a_graph_for_every_length_fails():
    with pytest.raises(RecompileError):
        assert_one_graph(lambda x: x * int(f"{x.shape[0]}"), CASES)


def test_a_break_fails():
    with pytest.raises(Unsupported):
        assert_one_graph(lambda x: x if x.sum() > 0 else -x, CASES)


def test_other_numbers_fail():
    with pytest.raises(AssertionError):
        assert_one_graph(lambda x: x + torch.compiler.is_compiling(), CASES)
