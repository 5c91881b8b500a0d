"""A frozen linear layer with a LoRA adapter of its own for every example of the batch.

Roofline at the 500M shape (d_in 2,560, d_out 960, r 32): one token reads W, 4.9 MB in bf16, plus
0.23 MB an adapter: 2.6 us on an A100 (2.0 TB/s), 1.2 us at 4.3 TB/s, memory bound up to some
hundred tokens; a training batch is bound by the GEMM over W, to which the adapter adds r/d.

Where fusing cannot win: an adapter added inside a GEMM of ours saves up to 33% of a token's time at
the 500M shape and 10-13% at the 2.2B shape (d_in 8,192), less what our GEMM lacks of cuBLAS's rate;
with rank 32 and the 2.2B shape nothing is left of it when that GEMM recomputes x Aᵀ. The product
over W therefore has three forms (``kernels.py``), and data chooses.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from csrc_triton.dispatch import Op
from csrc_triton.lora_linear import reference
from csrc_triton.lora_linear.self_check import SELF_CHECKS
from csrc_triton.transforms import (
    differentiable_backward,
    refuse_forward_mode,
    register_autocast,
    run_plain,
    transformed,
)


def _load_kernels() -> ModuleType:
    from csrc_triton.lora_linear import kernels

    return kernels


OP = Op("lora_linear", reference, _load_kernels, SELF_CHECKS)


def _implementation(
    direction: str, x: Tensor, lora_a: Tensor, adapter_index: Tensor, *others: Tensor | None
) -> ModuleType:
    rows, examples = x.numel() // max(1, x.shape[-1]), adapter_index.numel()
    shape = {
        "direction": direction,
        "rows": rows,
        # One token an example takes kernels of its own.
        "tokens": rows // max(1, examples),
        "rank": lora_a.shape[1],
    }
    return OP.implementation(x, lora_a, adapter_index, *others, **shape)


def _require(holds: bool, name: str, expected: str, found: object) -> None:
    if not holds:
        raise ValueError(f"lora_linear: {name} must be {expected}, not {found}")


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_index: Tensor,
    scale: float,
    ranks: Tensor | None,
    offsets: Tensor | None,
) -> None:
    """Everything that can be known without waiting for a GPU; values of indices on a CPU only."""
    packed = offsets is not None
    _require(x.dim() == (2 if packed else 3), "x", "[T, d_in] packed, else [E, T, d_in]",
             list(x.shape))  # fmt: skip
    d_in, examples = x.shape[-1], adapter_index.numel()
    _require(weight.dim() == 2 and weight.shape[1] == d_in, "weight", f"[d_out, {d_in}]",
             list(weight.shape))  # fmt: skip
    d_out = weight.shape[0]
    _require(lora_a.dim() == 3 and lora_a.shape[2] == d_in, "lora_a", f"[n, r, {d_in}]",
             list(lora_a.shape))  # fmt: skip
    adapters, rank, _ = lora_a.shape
    shapes = {
        "bias": (bias, [d_out]),
        "lora_b": (lora_b, [adapters, rank, d_out]),
        "adapter_index": (adapter_index, [examples if packed else x.shape[0]]),
        "ranks": (ranks, [adapters]),
        "offsets": (offsets, [examples + 1]),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None:
            _require(list(tensor.shape) == shape, name, str(shape), list(tensor.shape))
            _require(tensor.device == x.device, name, f"on {x.device}", tensor.device)
    for name, tensor in (("weight", weight), ("lora_a", lora_a)):
        _require(tensor.device == x.device, name, f"on {x.device}", tensor.device)
    for name, tensor in (("x", x), ("lora_a", lora_a), ("lora_b", lora_b)):
        _require(tensor.is_floating_point(), name, "floating point", tensor.dtype)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            _require(tensor.dtype == x.dtype, name, f"of x's dtype {x.dtype}", tensor.dtype)
    for name, tensor in (("adapter_index", adapter_index), ("ranks", ranks), ("offsets", offsets)):
        if tensor is not None:
            _require(tensor.dtype in (torch.int32, torch.int64), name, "int32 or int64",
                     tensor.dtype)  # fmt: skip
    _require(math.isfinite(scale), "scale", "finite", scale)
    # Under torch.func, values may be those of a whole batch, which have no one number.
    if x.device.type == "cpu" and not torch._C._are_functorch_transforms_active():
        _check_range("adapter_index", adapter_index, -1, adapters - 1)
        if ranks is not None:
            _check_range("ranks", ranks, 0, rank)
        if offsets is not None:
            rising = bool(offsets[0] == 0 and (offsets.diff() >= 0).all())
            _require(rising and int(offsets[-1]) <= x.shape[0], "offsets",
                     f"rising from 0 to at most {x.shape[0]}", offsets.tolist())  # fmt: skip


def _check_range(name: str, values: Tensor, low: int, high: int) -> None:
    if values.numel():
        least, most = (int(v) for v in torch.aminmax(values))
        _require(low <= least and most <= high, name, f"in [{low}, {high}]",
                 f"in [{least}, {most}]")  # fmt: skip


@torch.library.custom_op("v2l::lora_linear", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_index: Tensor,
    scale: float,
    ranks: Tensor | None,
    offsets: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """y, and u = scale · x A_iᵀ [tokens, r] for the gradient of B; u is [0, r] unless ``keep``."""
    refuse_forward_mode("lora_linear", x, weight, bias, lora_a, lora_b)
    _check(x, weight, bias, lora_a, lora_b, adapter_index, scale, ranks, offsets)
    tensors = (weight, bias, lora_b, ranks, offsets)
    return _implementation("forward", x, lora_a, adapter_index, *tensors).lora_linear(
        x, weight, bias, lora_a, lora_b, adapter_index, scale, ranks, offsets, keep
    )


@torch.library.custom_op("v2l::lora_linear_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_index: Tensor,
    scale: float,
    ranks: Tensor | None,
    offsets: Tensor | None,
    u: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (grad, weight, lora_b, ranks, offsets)
    return _implementation("backward", x, lora_a, adapter_index, *tensors).lora_linear_backward(
        grad, x, weight, lora_a, lora_b, adapter_index, scale, ranks, offsets, u
    )


@_forward.register_fake
def _(x, weight, bias, lora_a, lora_b, adapter_index, scale, ranks, offsets, keep):
    tokens = math.prod(x.shape[:-1]) if keep else 0
    return (
        x.new_empty(*x.shape[:-1], weight.shape[0]),
        x.new_empty(tokens, lora_a.shape[1]),
    )


@_backward.register_fake
def _(grad, x, weight, lora_a, lora_b, adapter_index, scale, ranks, offsets, u):
    return (
        x.new_empty(x.shape),
        lora_a.new_empty(lora_a.shape),
        lora_b.new_empty(lora_b.shape),
    )


# x, weight and bias, as F.linear; the op itself takes the factors of an adapter in any dtype.
_CAST = 3
register_autocast("lora_linear", _CAST)
register_autocast("lora_linear_backward", 0)


def _plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_index: Tensor,
    scale: float,
    ranks: Tensor | None,
    offsets: Tensor | None,
) -> Tensor:
    """The op in plain torch operations, whose derivatives PyTorch knows."""
    _check(x, weight, bias, lora_a, lora_b, adapter_index, scale, ranks, offsets)
    return reference.differentiable_lora_linear(
        x, weight, bias, lora_a, lora_b, adapter_index, scale, ranks, offsets
    )


def _setup(ctx, inputs, output) -> None:
    x, weight, _, lora_a, lora_b, adapter_index, ctx.scale, ranks, offsets, _ = inputs
    u = output[1]
    ctx.mark_non_differentiable(u)
    ctx.save_for_backward(x, weight, lora_a, lora_b, adapter_index, ranks, offsets, u)


def _autograd(ctx, grad, _):
    x, weight, lora_a, lora_b, adapter_index, ranks, offsets, u = ctx.saved_tensors
    if torch.is_grad_enabled():
        # create_graph=True: these gradients are to be differentiated again.
        d_x, d_a, d_b = differentiable_backward(
            lambda x, a, b: reference.differentiable_lora_linear(
                x, weight.detach(), None, a, b, adapter_index, ctx.scale, ranks, offsets
            ),
            (x, lora_a, lora_b),
            (grad,),
        )
        return d_x, None, None, d_a, d_b, None, None, None, None, None
    d_x, d_a, d_b = _backward(
        grad.contiguous(), x, weight, lora_a, lora_b, adapter_index, ctx.scale, ranks, offsets, u
    )
    return d_x, None, None, d_a, d_b, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_index: Tensor,
    scale: float,
    *,
    ranks: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ (+ bias) + scale · (x A_iᵀ) B_i, i = adapter_index of the example.

    Paper Eq. 8 with one adapter an example. ``scale`` is used as it is, not divided by the rank.

    Args:
        x: [E, T, d_in]; or [T, d_in], the examples packed behind each other, with ``offsets``.
        weight: [d_out, d_in], frozen: ``backward()`` gives it no gradient, nor ``bias`` [d_out].
        lora_a, lora_b: [n, r, d_in] and [n, r, d_out], the batch's distinct adapters.
        adapter_index: [E] integer; several examples may share an adapter; -1 means none.
        ranks: [n] integer, how many of the r slots each adapter uses; all when None.
        offsets: [E + 1] integer token offsets of packed examples, starting at 0; empty ones are
            legal.

    Returns:
        [E, T, d_out] or [T, d_out] of x's dtype. Differentiable in x, lora_a and lora_b, any
        number of times and in both modes; what differentiates in forward mode or more than once,
        and every transform of ``torch.func``, runs in plain torch operations. Under autocast, x,
        weight and bias are cast as by ``F.linear``.

    Raises:
        ValueError: an argument's shape, dtype or device does not fit, scale is not finite or, on a
            CPU, an index is out of range; on a GPU that is not looked at and counts as -1.
    """
    if transformed():
        args = x, weight, bias, lora_a, lora_b, adapter_index, float(scale), ranks, offsets
        return run_plain(_plain, args, _CAST)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, lora_a, lora_b))
    y, _ = _forward(
        x, weight, bias, lora_a, lora_b, adapter_index, float(scale), ranks, offsets, keep
    )
    return y
