"""The self-checks' results are integers that every dtype holds; one wrong element is detected."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from csrc_triton import dispatch
from csrc_triton.lora_linear.op import OP as LORA_LINEAR
from csrc_triton.perceiver_attention.op import OP as PERCEIVER_ATTENTION
from csrc_triton.rank_projection import reference
from csrc_triton.rank_projection.op import OP as RANK_PROJECTION

CPU = torch.device("cpu")
CHECKS = [
    pytest.param(op, check, id=f"{op.name}-{check}")
    for op in (PERCEIVER_ATTENTION, RANK_PROJECTION, LORA_LINEAR)
    for check in op.self_checks
]


@pytest.mark.parametrize(("op", "check"), CHECKS)
def test_results_are_integers_that_bfloat16_holds(op, check):
    run = op.self_checks[check](CPU, False)
    rounded, exact = (run(op.reference, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert all(t.dtype == torch.bfloat16 for t in rounded)
    for t in exact:
        assert torch.equal(t, t.round()) and t.abs().max() <= dispatch.LARGEST_INTEGER
    assert any(t.any() for t in exact)


@pytest.mark.parametrize(("op", "check"), CHECKS)
def test_kernels_pass(op, check, kernel_device):
    on_gpu = kernel_device.type == "cuda"
    for dtype in (torch.float16, torch.bfloat16) if on_gpu else (torch.float16,):
        assert op.wrong_elements(check, dtype, kernel_device, small=not on_gpu) == 0


@pytest.mark.parametrize("offset", [0.0, 1.0, float("nan")])
def test_one_wrong_element_is_detected(offset):
    class Kernels:
        @staticmethod
        def rank_projection(*args):
            a, b = reference.rank_projection(*args)
            b.view(-1)[5] += offset
            return a, b

    op = dataclasses.replace(RANK_PROJECTION, load_kernels=lambda: Kernels)
    wrong = op.wrong_elements("projection", torch.float16, CPU, small=True)
    assert wrong == (0 if offset == 0 else 1)
