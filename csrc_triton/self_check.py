"""Self-checks of kernels: sums of small integers, of which every bit must be right.

Every dtype here holds these integers exactly, so the result does not depend on the order of a sum,
and a compiler that miscompiles a pipelined product is detected (ptxas before 13.3, triton#9433).
An op's checks use the sizes of the 500M shape with few rows, so that they launch the tiles of real
calls. Tolerances, odd shapes and strides are what ``tests/csrc_triton`` covers.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

# bfloat16 holds every integer up to this one.
LARGEST_INTEGER = 256

# Runs an implementation of the op (its module ``kernels`` or ``reference``) on the check's inputs
# in a dtype, and returns outputs and gradients.
Run = Callable[[ModuleType, torch.dtype], list[Tensor]]
# Builds the inputs: (device, small) -> Run. ``small`` selects sizes for Triton's interpreter.
SelfCheck = Callable[[torch.device, bool], Run]


def wrong_elements(
    check: SelfCheck,
    kernels: ModuleType,
    reference: ModuleType,
    dtype: torch.dtype,
    device: torch.device,
    small: bool = False,
) -> int:
    """Number of wrong elements in the kernels' outputs and gradients; waits for the device."""
    with torch.no_grad():
        run = check(device, small)
        outputs, expected = run(kernels, dtype), run(reference, torch.float32)
        wrong = [(o.float() != e).sum() for o, e in zip(outputs, expected, strict=True)]
        return int(torch.stack(wrong).sum())


def generator() -> torch.Generator:
    """A generator with the seed of all self-checks."""
    return torch.Generator().manual_seed(1)


def random_signs(generator: torch.Generator, density: float, *shape: int) -> Tensor:
    """A tensor of -1, 0 and 1, of which a share of ``density`` is nonzero."""
    uniform = torch.rand(*shape, generator=generator)
    return (uniform < density / 2).float() - (uniform > 1 - density / 2).float()


def sparse_ones(like: Tensor) -> Tensor:
    """A cotangent that is 1 in every 61st element and 0 elsewhere."""
    positions = torch.arange(like.numel(), device=like.device)
    return (positions % 61 == 0).view(like.shape).to(like.dtype)
