"""Rank latents of one layer to LoRA factors: unit norm, head, scalers, split into A and B.

Roofline: one pass over the layer's head, Z·(d_in + d_out) weights: 1.8 M at the 500M shape, 3.6 MB
in bf16, 1.8 us on an A100 (2.0 TB/s), 0.84 us at 4.3 TB/s; 5.2 M at 2.2B. The rows (N·R) are few,
so it stays memory bound up to about 180 of them. The row norm commutes with the GEMM and belongs in
its epilogue, as do the scalers.

Far above 180 rows the product is all that counts. cuBLAS's is faster there than the kernel's, but
writes its result in float32, which norm and scalers then read again: predicted 8 us against the
kernel's 5 us at 768 rows on an H100. The backward is matrix products and nothing else, on both
paths.
"""

from __future__ import annotations

import warnings
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
)
from csrc_triton.rank_projection import reference
from csrc_triton.transforms import (
    differentiable_backward,
    refuse_forward_mode,
    register_autocast,
    run_plain,
    transformed,
)


def _load_kernels() -> ModuleType:
    from csrc_triton.rank_projection import kernels

    return kernels


def _projection(device: torch.device, small: bool) -> Run:
    """Latents of norm 4 and scalers of 4: the factors are sums of signs."""
    random = generator()
    depth, d_in, d_out = (64, 40, 24) if small else (512, 2560, 960)
    order = torch.rand(1 if small else 8, 16, depth, generator=random).argsort(-1)
    latents = (order < 16).float() * (1 - 2 * (order % 2)).float()
    scaler = torch.full((16,), 4.0)
    weight = random_signs(random, 1.0, depth, d_in + d_out)
    inputs = [t.to(device) for t in (latents, weight, scaler, scaler)]

    def run(implementation: ModuleType, dtype: torch.dtype) -> list[Tensor]:
        args = [t.to(dtype) for t in inputs]
        return list(implementation.rank_projection(*args, d_in, d_out))

    return run


SELF_CHECKS: dict[str, SelfCheck] = {"projection": _projection}

OP = Op("rank_projection", reference, _load_kernels, SELF_CHECKS)


def _implementation(direction: str, latents: Tensor, *others: Tensor) -> ModuleType:
    rows = latents.shape[0] * latents.shape[1]
    return OP.implementation(latents, *others, direction=direction, rows=rows)


def _check(
    latents: Tensor, weight: Tensor, scaler_a: Tensor, scaler_b: Tensor, d_in: int, d_out: int
) -> None:
    check = Arguments("rank_projection")
    check.shape("latents", latents, "N", "R", "Z")
    _, rank, depth = latents.shape
    check.shape("weight", weight, depth, "W")
    check.require(weight.shape[1] >= d_in + d_out, "weight", f"[{depth}, {d_in + d_out} or more]",
                  list(weight.shape))  # fmt: skip
    check.shape("scaler_a", scaler_a, rank)
    check.shape("scaler_b", scaler_b, rank)
    tensors = {"weight": weight, "scaler_a": scaler_a, "scaler_b": scaler_b}
    check.floating(latents=latents, **tensors)
    check.device(latents.device, **tensors)


@torch.library.custom_op("v2l::rank_projection", mutates_args=())
def _forward(
    latents: Tensor, weight: Tensor, scaler_a: Tensor, scaler_b: Tensor, d_in: int, d_out: int
) -> tuple[Tensor, Tensor]:
    tensors = latents, weight, scaler_a, scaler_b
    refuse_forward_mode("rank_projection", *tensors)
    _check(*tensors, d_in, d_out)
    return _implementation("forward", *tensors).rank_projection(*tensors, d_in, d_out)


@torch.library.custom_op("v2l::rank_projection_backward", mutates_args=())
def _backward(
    grad_a: Tensor,
    grad_b: Tensor,
    latents: Tensor,
    weight: Tensor,
    scaler_a: Tensor,
    scaler_b: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = latents, weight, scaler_a, scaler_b
    return _implementation("backward", *tensors, grad_a, grad_b).rank_projection_backward(
        grad_a, grad_b, *tensors
    )


@_forward.register_fake
def _(latents, weight, scaler_a, scaler_b, d_in, d_out):
    return latents.new_empty(*latents.shape[:2], d_in), latents.new_empty(*latents.shape[:2], d_out)


@_backward.register_fake
def _(grad_a, grad_b, *tensors):
    return tuple(t.new_empty(t.shape) for t in tensors)


# A normalization: it keeps its inputs' precision, as layer_norm does.
register_autocast("rank_projection", 0)
register_autocast("rank_projection_backward", 0)


def _plain(
    latents: Tensor, weight: Tensor, scaler_a: Tensor, scaler_b: Tensor, d_in: int, d_out: int
) -> tuple[Tensor, Tensor]:
    """The op in plain torch operations, whose derivatives PyTorch knows."""
    args = latents, weight, scaler_a, scaler_b, d_in, d_out
    _check(*args)
    return reference.differentiable_rank_projection(*args)


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.d_in, ctx.d_out = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, grad_a, grad_b):
    if torch.is_grad_enabled():
        # create_graph=True: these gradients are to be differentiated again.
        grads = differentiable_backward(
            lambda *tensors: reference.differentiable_rank_projection(
                *tensors, ctx.d_in, ctx.d_out
            ),
            ctx.saved_tensors,
            (grad_a, grad_b),
        )
    else:
        grads = _backward(grad_a.contiguous(), grad_b.contiguous(), *ctx.saved_tensors)
    return *grads, None, None


_forward.register_autograd(_autograd, setup_context=_setup)


def rank_projection(
    latents: Tensor,
    weight: Tensor,
    scaler_a: Tensor,
    scaler_b: Tensor,
    bias_a: Tensor | None = None,
    bias_b: Tensor | None = None,
    *,
    d_in: int,
    d_out: int,
) -> tuple[Tensor, Tensor]:
    """LoRA factors of one layer.

    Version 0.1 took all layers, with chunks and a bias adapter: latents [G, C, L, R, Z], weight
    [L, Z, W], scalers [L, R], biases [L, R', d], to A [G, L, C R + R', d_in] and B. That form is
    deprecated.

    Args:
        latents: [N, R, Z]; each row is divided by its L2 norm (a zero row stays zero).
        weight: [Z, W] head, W >= d_in + d_out; columns d_in of A, then d_out of B, then unused.
        scaler_a, scaler_b: [R].

    Returns:
        A [N, R, d_in] and B [N, R, d_out] of latents' dtype. Differentiable in every tensor, any
        number of times and in both modes; what differentiates in forward mode or more than once,
        and every transform of ``torch.func``, runs in plain torch operations. Autocast does not
        change its precision.

    Raises:
        ValueError: an argument's shape, dtype or device does not fit.
    """
    if latents.dim() == 5:
        warnings.warn(
            "rank_projection takes one layer: latents [N, R, Z]; the form with all layers goes "
            "with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return _all_layers(latents, weight, scaler_a, scaler_b, bias_a, bias_b, d_in, d_out)
    if bias_a is not None or bias_b is not None:
        raise ValueError(
            "rank_projection: bias_a and bias_b must be None, got a bias for one layer"
        )
    args = latents, weight, scaler_a, scaler_b, d_in, d_out
    return run_plain(_plain, args, 0) if transformed() else _forward(*args)


def _all_layers(
    latents: Tensor,
    weight: Tensor,
    scaler_a: Tensor,
    scaler_b: Tensor,
    bias_a: Tensor | None,
    bias_b: Tensor | None,
    d_in: int,
    d_out: int,
) -> tuple[Tensor, Tensor]:
    """The deprecated form: latents [G, C, L, R, Z] to A [G, L, C R + R', d_in], and B likewise."""
    groups, chunks, layers, rank, _ = latents.shape
    check = Arguments("rank_projection")
    check.shape("weight", weight, layers, latents.shape[-1], "W")
    check.shape("scaler_a", scaler_a, layers, rank)
    check.shape("scaler_b", scaler_b, layers, rank)
    check.require((bias_a is None) == (bias_b is None), "bias_b", "set with bias_a", "one of them")
    factors = [
        rank_projection(
            latents[:, :, i].flatten(0, 1), weight[i], scaler_a[i], scaler_b[i],
            d_in=d_in, d_out=d_out,
        )
        for i in range(layers)
    ]  # fmt: skip
    joined = []
    for index, bias in enumerate((bias_a, bias_b)):
        part = torch.stack([layer[index] for layer in factors], 1)
        part = part.unflatten(0, (groups, chunks)).transpose(1, 2).flatten(2, 3)
        if bias is not None:
            shared = bias.to(part.dtype).expand(groups, *bias.shape)
            part = torch.cat([part, shared], 2)
        joined.append(part)
    return joined[0], joined[1]
