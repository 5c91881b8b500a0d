"""How the ops behave under PyTorch's transforms: autocast, ``torch.func``, forward-mode AD.

An op's kernels are opaque to PyTorch, and so is its backward pass: forward-mode AD would take its
derivative for zero, and a derivative of its derivative does not exist. Where one is taken, an op
runs as its definition in plain torch operations instead, which PyTorch differentiates any number
of times and in either mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
_LIBRARY = torch.library.Library("v2l", "FRAGMENT")


def transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode AD is active here."""
    if torch._C._are_functorch_transforms_active():
        return True
    # Dynamo follows torch.func, but breaks the graph at dual levels: there is none inside a graph.
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """What an op's kernels do where forward-mode AD reaches them, through a compiled graph for one.

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


def run_plain(function: Callable, args: Sequence[object], cast: int) -> Tensor | tuple[Tensor, ...]:
    """An op's definition in place of the op, with the same rule for autocast."""
    device = args[0].device.type
    if device in AUTOCAST_KEYS and torch.is_autocast_enabled(device):
        return _without_autocast(function, args, cast, device)
    return function(*args)


def _without_autocast(
    function: Callable, args: Sequence[object], cast: int, device: str
) -> Tensor | tuple[Tensor, ...]:
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        return function(*(_cast(a, dtype) if i < cast else a for i, a in enumerate(args)))


def _cast(value: object, dtype: torch.dtype) -> object:
    casts = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if casts and value.dtype != torch.float64 else value


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
        # Views, because one tensor may be several inputs, and each has a gradient of its own.
        views = [t if t is None or not t.requires_grad else t.view_as(t) for t in inputs]
        outputs = function(*views)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        wanted = [t for t in views if t is not None and t.requires_grad]
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        results = iter(
            torch.autograd.grad(
                [o for o, _ in pairs],
                wanted,
                [g for _, g in pairs],
                create_graph=True,
                allow_unused=True,
            )
        )
    return [next(results) if t is not None and t.requires_grad else None for t in views]
