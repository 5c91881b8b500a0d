"""Checks that every op must pass.

They take the op as a function of tensors, and an oracle: the same function in differentiable
PyTorch operations that share no code with the op.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal values that depend on the seed and the shape alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def values_and_gradients(
    function: Function, inputs: Sequence[Tensor], cotangents: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Outputs, then the gradients of Σ <output, cotangent> for the inputs; zeros for unused ones.

    Cotangents default to fixed random tensors.
    """
    leaves = [t.detach().requires_grad_() for t in inputs]
    results = outputs(function(*leaves))
    if cotangents is None:
        cotangents = [random(*r.shape, seed=97 + i).to(r) for i, r in enumerate(results)]
    used = [(r, c) for r, c in zip(results, cotangents, strict=True) if r.requires_grad]
    grads = torch.autograd.grad(
        [r for r, _ in used], leaves, [c for _, c in used], allow_unused=True
    )
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)]
    return [*(r.detach() for r in results), *grads]


def assert_equals_oracle(
    op: Function,
    oracle: Function,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Values and gradients against the oracle in float64, both on ``device``.

    In another dtype the op may err by twice what the oracle errs when computed in that dtype.
    """
    rounded = [t.to(device, dtype) for t in inputs]
    exact = values_and_gradients(oracle, [t.double() for t in rounded])
    results = values_and_gradients(op, rounded)
    assert_as_exact_as(values_and_gradients(oracle, rounded), results, exact, dtype)


def assert_as_exact_as(
    same_dtype: Sequence[Tensor],
    results: Sequence[Tensor],
    exact: Sequence[Tensor],
    dtype: torch.dtype,
) -> None:
    """Results err by at most twice what an oracle errs that is computed in ``dtype``."""
    assert [f.shape for f in results] == [e.shape for e in exact]
    for f, e, s in zip(results, exact, same_dtype, strict=True):
        finite = torch.isfinite(e)
        assert torch.equal(f[~finite].double(), e[~finite])
        if not finite.any():
            continue
        size = e[finite].abs().max().item()
        allowed = 2 * (s.double() - e)[finite].abs().max().item()
        allowed += 16 * torch.finfo(dtype).eps * size
        error = (f.double() - e)[finite].abs().max().item()
        assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}, size {size:.2e}"


def assert_gradcheck(op: Function, inputs: Sequence[Tensor]) -> None:
    assert torch.autograd.gradcheck(op, [t.double().requires_grad_() for t in inputs])


def widest_dtype() -> torch.dtype:
    """The widest dtype that the implementation under test serves."""
    return torch.float64 if os.environ["V2L_BACKEND"] == "reference" else torch.float32


def assert_layouts_do_not_matter(
    op: Function, inputs: Sequence[Tensor], device: torch.device
) -> None:
    """Transposed inputs and expanded cotangents give the results of contiguous ones."""
    dtype = widest_dtype()
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}

    def strided(t: Tensor) -> Tensor:
        return t.mT.contiguous().mT if t.dim() > 1 else t.repeat_interleave(2)[::2]

    contiguous = [t.to(device, dtype).contiguous() for t in inputs]
    expected = outputs(op(*contiguous))
    assert all(r.is_contiguous() for r in expected)
    ones = [torch.ones((), dtype=r.dtype, device=device).expand(r.shape) for r in expected]
    expected = values_and_gradients(op, contiguous, [o.contiguous() for o in ones])
    turned = [strided(t) for t in contiguous]
    assert not all(t.is_contiguous() for t in turned)
    for f, e in zip(values_and_gradients(op, turned, ones), expected, strict=True):
        torch.testing.assert_close(f, e, **tolerance)


def assert_same_bits_twice(op: Function, inputs: Sequence[Tensor]) -> None:
    """Values and gradients of two equal calls are equal bit for bit."""
    first, second = (values_and_gradients(op, inputs) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def opcheck_backward(op: torch._ops.OpOverload, args: tuple) -> None:
    """Checks schema, aliasing, shapes, strides and dtypes of an op without derivatives."""
    args = tuple(t.detach() if isinstance(t, Tensor) else t for t in args)
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def assert_compiles(
    op: Function, inputs: Sequence[Tensor], longer: Sequence[Tensor], backend: str
) -> None:
    """One compiled graph, forward and backward, equals the eager op for every length."""
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend=backend, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tensors in (inputs, longer):
            results = values_and_gradients(compiled, tensors)
            for f, e in zip(results, values_and_gradients(op, tensors), strict=True):
                torch.testing.assert_close(f, e)


@functools.cache
def register_wide_product() -> torch.library.Library:
    """Let a CPU multiply half precision into float32, as only GPUs do; for the whole process."""
    library = torch.library.Library("aten", "IMPL")

    def bmm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
        return torch.matmul(a.to(out_dtype), b.to(out_dtype))

    library.impl("bmm.dtype", bmm, "CPU")
    return library
