"""lora_linear by a given form of its product over W, whatever the tables choose."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from csrc_triton import lora_linear
from csrc_triton.dispatch import requested_backend


def in_form(form: str) -> Callable[..., Tensor]:
    """``lora_linear`` in a form, differentiable; the reference where that is asked for."""

    def call(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        index: Tensor,
        scale: float,
    ) -> Tensor:
        if requested_backend() == "reference":
            return lora_linear(x, weight, bias, lora_a, lora_b, index, scale)
        return _InForm.apply(x, weight, bias, lora_a, lora_b, index, scale, form)

    return call


class _InForm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, index, scale, form):
        from csrc_triton.lora_linear import kernels

        ctx.rest = index, scale, None, None
        ctx.config = {"prefill": {"form": form}}
        args = x, weight, bias, lora_a, lora_b, *ctx.rest, True, ctx.config
        y, u = kernels.lora_linear(*args)
        ctx.save_for_backward(x, weight, lora_a, lora_b, u)
        return y

    @staticmethod
    def backward(ctx, grad):
        from csrc_triton.lora_linear import kernels

        *tensors, u = ctx.saved_tensors
        grads = kernels.lora_linear_backward(grad, *tensors, *ctx.rest, u, ctx.config)
        return grads[0], None, None, *grads[1:], None, None, None
