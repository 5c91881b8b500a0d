"""How the ops behave under PyTorch's transforms: autocast, ``torch.func``, forward-mode AD.

An op's kernels are opaque to PyTorch, and so is its backward pass: forward-mode AD would take its
derivative to be zero, and second derivatives do not exist. Where one is needed, the op runs as its
definition in plain PyTorch operations, which PyTorch differentiates any number of times and in
either mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

Result = TypeVar("Result")

AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
_LIBRARY = torch.library.Library("v2l", "FRAGMENT")


def transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode AD is active here."""
    if torch._C._are_functorch_transforms_active():
        return True
    # Dynamo traces torch.func but breaks the graph at dual levels, so none is active in a graph.
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """Refuse a call that forward-mode AD reaches all the same, for example in a compiled graph.

    Raises:
        RuntimeError: a tensor has a tangent, which would be lost.
    """
    if forward_ad._current_level < 0:
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            f"{op}: forward-mode AD does not reach through a compiled graph or torch.ops.v2l: call "
            f"csrc_triton.{op} outside of torch.compile"
        )


def register_autocast(op: str, cast: int) -> None:
    """Under autocast, cast the first ``cast`` arguments of ``v2l::op`` as ``F.linear`` does.

    The op itself then runs with autocast disabled, in the dtypes of its arguments.
    """
    overload = getattr(torch.ops.v2l, op).default
    for device, key in AUTOCAST_KEYS.items():

        def kernel(_, *args, device=device):
            return _without_autocast(overload, args, cast, device)

        _LIBRARY.impl(op, kernel, key, with_keyset=True)


def run_plain(function: Callable[..., Result], args: Sequence[Any], cast: int) -> Result:
    """Call an op's definition in place of the op, with the same rule for autocast."""
    device = args[0].device.type
    if device in AUTOCAST_KEYS and torch.is_autocast_enabled(device):
        return _without_autocast(function, args, cast, device)
    return function(*args)


def _without_autocast(
    function: Callable[..., Result], args: Sequence[Any], cast: int, device: str
) -> Result:
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        return function(*(_cast(a, dtype) if i < cast else a for i, a in enumerate(args)))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value if value.dtype == torch.float64 else value.to(dtype)


def differentiable_backward(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of ``function(*inputs)`` that can be differentiated again.

    Returns:
        For each input its gradient; None where the input is None or needs none.
    """
    with torch.enable_grad():
        # Views, because one tensor may be passed twice, and each argument has its own gradient.
        views = [t if t is None or not t.requires_grad else t.view_as(t) for t in inputs]
        result = function(*views)
        outputs = [result] if isinstance(result, Tensor) else list(result)
        differentiable = [t for t in views if t is not None and t.requires_grad]
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        results = iter(
            torch.autograd.grad(
                [o for o, _ in pairs],
                differentiable,
                [g for _, g in pairs],
                create_graph=True,
                allow_unused=True,
            )
        )
    return [next(results) if t is not None and t.requires_grad else None for t in views]
