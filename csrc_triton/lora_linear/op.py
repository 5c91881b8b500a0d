"""A frozen linear layer with a LoRA adapter of its own for every example of the batch.

Roofline at the 500M shape (d_in 2,560, d_out 960, r 32): one token reads W, 4.9 MB in bf16, plus
0.23 MB an adapter: 2.6 us on an A100 (2.0 TB/s), 1.2 us at 4.3 TB/s, memory bound up to some
hundred tokens; a training batch is bound by the GEMM over W, to which the adapter adds r/d.

Where fusing cannot win: an adapter added inside a GEMM of ours saves up to 33% of a token's time at
the 500M shape and 10-13% at the 2.2B shape (d_in 8,192), less what our GEMM lacks of cuBLAS's rate.
The GEMM over W is therefore cuBLAS's, in training, prefill and decoding.
"""

from __future__ import annotations

import math
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from csrc_triton.dispatch import (
    Arguments,
    Op,
    Run,
    SelfCheck,
    generator,
    random_signs,
    requested_backend,
    sparse_ones,
)
from csrc_triton.lora_linear import reference
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


def _linear(tokens: int, keep: bool, device: torch.device, small: bool) -> Run:
    """Sparse signs everywhere; of four examples two share an adapter and one has none.

    keep: whether to check the backward pass, too.
    """
    random = generator()
    d_in, d_out, rank = (96, 40, 16) if small else (2560, 960, 32)
    density = 0.1 if small else 0.03
    x = random_signs(random, density, 4, min(tokens, 3) if small else tokens, d_in)
    weight = random_signs(random, density, d_out, d_in)
    lora_a = random_signs(random, density, 3, rank, d_in)
    lora_b = random_signs(random, 0.25, 3, rank, d_out)
    inputs = [t.to(device) for t in (x, weight, lora_a, lora_b)]
    which = torch.tensor([2, 0, -1, 2], device=device), 1.0, None

    def run(implementation: ModuleType, dtype: torch.dtype) -> list[Tensor]:
        x, weight, a, b = (t.to(dtype) for t in inputs)
        y, u = implementation.lora_linear(x, weight, None, a, b, *which, keep)
        if not keep:
            return [y]
        grads = implementation.lora_linear_backward(sparse_ones(y), x, weight, a, b, *which, u)
        return [y, u, *grads]

    return run


SELF_CHECKS: dict[str, SelfCheck] = {
    "prefill": partial(_linear, 301, True),
    "decode": partial(_linear, 1, False),
}
OP = Op("lora_linear", reference, _load_kernels, SELF_CHECKS)


def _implementation(
    direction: str, x: Tensor, lora_a: Tensor, adapter_index: Tensor, *others: Tensor | None
) -> ModuleType:
    rows, examples = x.numel() // max(1, x.shape[-1]), adapter_index.numel()
    shape: dict[str, float | str] = {
        "direction": direction,
        "rows": rows,
        # One token an example takes kernels of its own.
        "tokens": rows // max(1, examples),
        "rank": lora_a.shape[1],
    }
    return OP.implementation(x, lora_a, adapter_index, *others, **shape)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_index: Tensor,
    scale: float,
    ranks: Tensor | None,
) -> None:
    """Everything that is known without waiting for a GPU; values of indices on a CPU only."""
    check = Arguments("lora_linear")
    check.shape("x", x, "E", "T", "d_in")
    examples, _, d_in = x.shape
    check.shape("weight", weight, "d_out", d_in)
    check.shape("lora_a", lora_a, "n", "r", d_in)
    d_out, (adapters, rank, _) = weight.shape[0], lora_a.shape
    check.shape("bias", bias, d_out)
    check.shape("lora_b", lora_b, adapters, rank, d_out)
    check.shape("adapter_index", adapter_index, examples)
    check.shape("ranks", ranks, adapters)
    check.device(
        x.device, weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b,
        adapter_index=adapter_index, ranks=ranks,
    )  # fmt: skip
    check.floating(x=x, lora_a=lora_a, lora_b=lora_b)
    check.dtype(x.dtype, weight=weight, bias=bias)
    check.dtype(torch.int32, torch.int64, adapter_index=adapter_index, ranks=ranks)
    check.require(math.isfinite(scale), "scale", "finite", scale)
    # Under torch.func, values may be those of a whole batch and not single numbers.
    if x.device.type == "cpu" and not torch._C._are_functorch_transforms_active():
        for name, values, low, high in (
            ("adapter_index", adapter_index, -1, adapters - 1), ("ranks", ranks, 0, rank)
        ):  # fmt: skip
            if values is not None and values.numel():
                least, most = (int(v) for v in torch.aminmax(values))
                check.require(low <= least and most <= high, name, f"in [{low}, {high}]",
                              f"values in [{least}, {most}]")  # fmt: skip


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
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """y, and u = scale · x A_iᵀ [tokens, r] for the gradient of B; u is [0, r] unless ``keep``."""
    refuse_forward_mode("lora_linear", x, weight, bias, lora_a, lora_b)
    _check(x, weight, bias, lora_a, lora_b, adapter_index, scale, ranks)
    tensors = (weight, bias, lora_b, ranks)
    return _implementation("forward", x, lora_a, adapter_index, *tensors).lora_linear(
        x, weight, bias, lora_a, lora_b, adapter_index, scale, ranks, keep
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
    u: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (grad, weight, lora_b, ranks)
    return _implementation("backward", x, lora_a, adapter_index, *tensors).lora_linear_backward(
        grad, x, weight, lora_a, lora_b, adapter_index, scale, ranks, u
    )


@_forward.register_fake
def _(x, weight, bias, lora_a, lora_b, adapter_index, scale, ranks, keep):
    tokens = math.prod(x.shape[:-1]) if keep else 0
    return (
        x.new_empty(*x.shape[:-1], weight.shape[0]),
        x.new_empty(tokens, lora_a.shape[1]),
    )


@_backward.register_fake
def _(grad, x, weight, lora_a, lora_b, adapter_index, scale, ranks, u):
    return (
        x.new_empty(x.shape),
        lora_a.new_empty(lora_a.shape),
        lora_b.new_empty(lora_b.shape),
    )


# x, weight and bias, as by F.linear; the op itself accepts factors of any dtype.
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
) -> Tensor:
    """The op in plain PyTorch operations, whose derivatives PyTorch knows."""
    _check(x, weight, bias, lora_a, lora_b, adapter_index, scale, ranks)
    return reference.differentiable_lora_linear(
        x, weight, bias, lora_a, lora_b, adapter_index, scale, ranks
    )


def _setup(ctx, inputs, output) -> None:
    x, weight, _, lora_a, lora_b, adapter_index, ctx.scale, ranks, _ = inputs
    u = output[1]
    ctx.mark_non_differentiable(u)
    ctx.save_for_backward(x, weight, lora_a, lora_b, adapter_index, ranks, u)


def _autograd(ctx, grad, _):
    x, weight, lora_a, lora_b, adapter_index, ranks, u = ctx.saved_tensors
    if torch.is_grad_enabled():
        # create_graph=True: these gradients will be differentiated again.
        d_x, d_a, d_b = differentiable_backward(
            lambda x, a, b: reference.differentiable_lora_linear(
                x, weight.detach(), None, a, b, adapter_index, ctx.scale, ranks
            ),
            (x, lora_a, lora_b),
            (grad,),
        )
        return d_x, None, None, d_a, d_b, None, None, None, None
    d_x, d_a, d_b = _backward(
        grad.contiguous(), x, weight, lora_a, lora_b, adapter_index, ctx.scale, ranks, u
    )
    return d_x, None, None, d_a, d_b, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup)


def _directly(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_index: Tensor,
    scale: float,
    ranks: Tensor | None,
) -> Tensor | None:
    """y in eager inference on a CPU; None where the op is needed, which also reports errors.

    For one token, dispatching the op and its masks cost ten times the adapter's products. Values of
    the index are read at every call: they are in host memory, and a cache of them could be stale.
    """
    if (
        torch.compiler.is_compiling()
        or not x.is_cpu
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.is_autocast_enabled("cpu")
        or torch.jit.is_tracing()
        or requested_backend() == "triton"
    ):
        return None
    dtype = x.dtype
    for tensor in (
        (x, weight, lora_a, lora_b) if bias is None else (x, weight, lora_a, lora_b, bias)
    ):
        if tensor.dtype != dtype or type(tensor) not in _PLAIN or not tensor.is_cpu:
            return None
    if type(adapter_index) is not Tensor or not adapter_index.is_cpu or x.dim() != 3:
        return None
    examples, _, d_in = x.shape
    d_out, adapters = weight.shape[0], lora_a.shape[0]
    rank = lora_a.shape[1] if lora_a.dim() == 3 else 0
    fits = (
        rank > 0
        and examples > 0
        and weight.shape == (d_out, d_in)
        and lora_a.shape == (adapters, rank, d_in)
        and lora_b.shape == (adapters, rank, d_out)
        and (bias is None or bias.shape == (d_out,))
        and adapter_index.shape == (examples,)
        and adapter_index.dtype in (torch.int64, torch.int32)
        and dtype.is_floating_point
        and math.isfinite(scale)
    )
    if not fits:
        return None
    index: list[int] = adapter_index.tolist()
    if min(index) < -1 or max(index) >= adapters:
        return None
    if ranks is not None and (
        type(ranks) is not Tensor
        or not ranks.is_cpu
        or ranks.dtype not in (torch.int32, torch.int64)
        or ranks.tolist() != [rank] * adapters
    ):
        return None
    return reference.lora_linear_unmasked(x, weight, bias, lora_a, lora_b, index, scale)


_PLAIN = (Tensor, torch.nn.Parameter)


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
) -> Tensor:
    """y = x Wᵀ (+ bias) + scale · (x A_iᵀ) B_i, i = adapter_index of the example.

    Eq. 8 of the paper with one adapter per example.

    Args:
        x: [E, T, d_in], T tokens of each of E examples.
        weight: [d_out, d_in], frozen: neither it nor ``bias`` gets a gradient.
        bias: [d_out], or None.
        lora_a, lora_b: [n, r, d_in] and [n, r, d_out], the distinct adapters of the batch.
        adapter_index: [E] int32 or int64, the adapter of each example; -1 for none.
        scale: multiplies the adapter's product; not divided by the rank.
        ranks: [n] int32 or int64, the number of rank slots that each adapter uses (None: all r).

    Returns:
        y [E, T, d_out] of x's dtype. Differentiable in x, lora_a and lora_b any number of times, in
        reverse and forward mode; higher derivatives, forward mode and the transforms of
        ``torch.func`` run in plain PyTorch operations. Under autocast, x, weight and bias are cast
        as by ``F.linear``.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, scale is not finite or, on a
            CPU, an index is out of range. A GPU does not check indices: one out of range counts as
            -1.
        RuntimeError: ``V2L_BACKEND=triton`` and the kernels cannot serve the call.
    """
    if transformed():
        args = x, weight, bias, lora_a, lora_b, adapter_index, float(scale), ranks
        return run_plain(_plain, args, _CAST)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, lora_a, lora_b))
    if not keep:
        y = _directly(x, weight, bias, lora_a, lora_b, adapter_index, float(scale), ranks)
        if y is not None:
            return y
    y, _ = _forward(x, weight, bias, lora_a, lora_b, adapter_index, float(scale), ranks, keep)
    return y
