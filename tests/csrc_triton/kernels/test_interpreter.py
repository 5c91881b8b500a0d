"""The interpreter itself: that it is on here, and the arithmetic the other tests lean on."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _product(x, y, out, SIZE: tl.constexpr):
    rows = tl.arange(0, SIZE)
    at = rows[:, None] * SIZE + rows[None, :]
    z = tl.dot(tl.load(x + at), tl.load(y + at), input_precision="ieee")
    tl.store(out + at, z.to(out.dtype.element_ty))


def test_kernels_are_interpreted():
    assert triton.knobs.runtime.interpret
    assert not isinstance(_product, triton.runtime.JITFunction)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_product(dtype):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 32, 32, generator=generator).to(dtype)
    out = torch.empty_like(x)
    _product[(1,)](x, y, out, SIZE=32)
    torch.testing.assert_close(out, x @ y)
