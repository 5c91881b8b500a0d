"""The interpreter that the kernel tests use where there is no GPU, and that it leaves no trace."""

from __future__ import annotations

import sys

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.csrc_triton.interpreter import check_versions, interpreted


@triton.jit
def product(x, y, out, SIZE: tl.constexpr):
    rows = tl.arange(0, SIZE)
    at = rows[:, None] * SIZE + rows[None, :]
    z = tl.dot(tl.load(x + at), tl.load(y + at), input_precision="ieee")
    z += tl.max(tl.zeros([SIZE, SIZE], tl.float32), 1)[:, None]
    tl.store(out + at, z.to(out.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_product(dtype):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 32, 32, generator=generator).to(dtype)
    out = torch.empty_like(x)
    with interpreted(sys.modules[__name__]):
        product[(1,)](x, y, out, SIZE=32)
    torch.testing.assert_close(out, x @ y)


def test_kernels_compile_afterwards():
    with interpreted(sys.modules[__name__]):
        assert not isinstance(product, triton.runtime.JITFunction)
    assert isinstance(product, triton.runtime.JITFunction)
    types = {"x": "*fp16", "y": "*fp16", "out": "*fp16", "SIZE": "constexpr"}
    source = ASTSource(product, types, constexprs={"SIZE": 32})
    assert "tt.dot" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]


def test_versions_that_do_not_fit_are_named():
    for versions in (("3.6.0", "2.3.5"), ("3.7.1", "2.4.6"), ("3.10.0+git", "2.5.0rc1")):
        check_versions(*versions)
    with pytest.raises(RuntimeError, match=r"triton 3\.6\.0 .* numpy 2\.4\.1: install numpy<2\.4"):
        check_versions("3.6.0", "2.4.1")
