"""Check of a compiled path: one graph, results equal to eager, no new graph for a new length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.golden import relative

# Frobenius norm of the difference over that of the values: fused kernels round less often.
TOLERANCE = {torch.bfloat16: 2**-8, torch.float32: 1e-5}
LENGTHS = (7, 12, 31, 20)


def ramp(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Smooth values in [-1, 1] without symmetry between positions."""
    count = torch.Size(shape).numel()
    return torch.sin(0.7 * torch.arange(count, dtype=torch.float64)).view(shape).to(dtype)


def values_and_gradients(
    function: Callable, args: Sequence[Any], parameters: Sequence[Tensor]
) -> list[Tensor]:
    """Every tensor that comes out and the gradients of their squares' sum for ``parameters``."""
    with torch.set_grad_enabled(bool(parameters)):
        actual = pytree.tree_leaves(function(*args))
    if not parameters:
        return actual
    loss = sum(value.double().square().sum() for value in actual)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [*(value.detach() for value in actual), *(g for g in grads if g is not None)]


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Shapes, dtypes and numbers."""
    assert len(actual) == len(expected)
    for f, e in zip(actual, expected, strict=True):
        assert f.shape == e.shape
        assert f.dtype == e.dtype
        assert relative(f, e) <= TOLERANCE[e.dtype]


def assert_one_graph(
    function: Callable,
    cases: Sequence[Sequence[Any]],
    parameters: Sequence[Tensor] = (),
    backend: str = "aot_eager",
    dynamic: bool | None = None,
    compilations: int = 2,
) -> None:
    """Compile without a break; equal eager in each case; compile in the first cases alone.

    Args:
        cases: arguments of one call after the other.
        parameters: compare gradients for these too; without any, nothing is recorded.
        dynamic: as torch.compile's; None is what a user gets.
        compilations: cases in which the compiler may run: a length, then any length.
    """
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    for place, args in enumerate(cases):
        expected = values_and_gradients(function, args, parameters)
        with torch._dynamo.config.patch(error_on_recompile=place >= compilations):
            actual = values_and_gradients(compiled, args, parameters)
        assert_same(actual, expected)
