"""A self-check of the kernels: sums of small integers, of which every bit must be right.

Every dtype here holds these integers, so whatever the order of a sum there is one right answer, and
a compiler that got a pipelined product wrong is seen (ptxas before 13.3, triton#9433). Sizes are
those of the 500M shape with few rows: the tiles are the ones that real calls take. Tolerances,
odd shapes and strides are the tests' business (``bench/checks.py`` on a GPU).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from csrc_triton import reference

# bfloat16 holds every integer up to here.
LARGEST_INTEGER = 256

Results = tuple[list[Tensor], list[Tensor]]
Canary = Callable[[torch.dtype, torch.device | str, bool], Results]


def wrong_elements(
    name: str, dtype: torch.dtype, device: torch.device | str, small: bool = False
) -> int:
    """How many elements of the kernels' outputs and gradients are wrong; waits for the device.

    Args:
        name: one of ``CANARIES``; an op has one or more.
        dtype: float16 or bfloat16.
        small: sizes for Triton's interpreter.
    """
    with torch.no_grad():
        found, expected = CANARIES[name](dtype, device, small)
        wrong = [(f.float() != e).sum() for f, e in zip(found, expected, strict=True)]
        return int(torch.stack(wrong).sum())


def of_op(op: str) -> list[str]:
    """The canaries of what an op launches by default."""
    return [name for name in CANARIES if name.split()[0] == op]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _signs(generator: torch.Generator, density: float, *shape: int) -> Tensor:
    """-1, 0 and 1; the share of those that are not 0 is ``density``."""
    drawn = torch.rand(*shape, generator=generator)
    return (drawn < density / 2).float() - (drawn > 1 - density / 2).float()


def _sparse_ones(like: Tensor) -> Tensor:
    """A cotangent that is 1 in every 61st slot and 0 elsewhere."""
    slots = torch.arange(like.numel(), device=like.device)
    return (slots % 61 == 0).view(like.shape).to(like.dtype)


def _attention(dtype: torch.dtype, device: torch.device | str, small: bool) -> Results:
    """Each query is a token of the context, whose score is so far above all others that its
    probability is exactly 1 and theirs 0; tokens of all tiles are chosen."""
    from csrc_triton.kernels import perceiver_attention as kernels

    slices, rows, tokens, width = (1, 16, 64, 256) if small else (4, 128, 1024, 512)
    context = _signs(_generator(), 1.0, slices, tokens, width).to(device)
    query = context[:, torch.arange(rows) * (tokens // rows) + 1]
    norm = torch.ones(slices, tokens, device=device)

    def results(implementation, *inputs: Tensor) -> list[Tensor]:
        out, lse = implementation.perceiver_attention(*inputs)
        cotangents = _sparse_ones(out), torch.zeros_like(lse)
        grads = implementation.perceiver_attention_backward(*cotangents, *inputs, out, lse)
        # That of the norm multiplies by a rounded probability, in float32.
        return [out, *grads[:2]]

    found = results(kernels, query.to(dtype), context.to(dtype), norm)
    return found, results(reference, query, context, norm)


def _projection(dtype: torch.dtype, device: torch.device | str, small: bool) -> Results:
    """Latents of norm 4 and scalers of 4: sums of signs."""
    from csrc_triton.kernels import rank_projection as kernels

    generator = _generator()
    layers, depth, d_in, d_out = (1, 64, 40, 24) if small else (8, 512, 2560, 960)
    order = torch.rand(1, 1, layers, 16, depth, generator=generator).argsort(-1)
    latents = (order < 16).float() * (1 - 2 * (order % 2)).float()
    scaler = torch.full((layers, 16), 4.0)
    weight = _signs(generator, 1.0, layers, depth, d_in + d_out)
    inputs = [t.to(device) for t in (latents, weight, scaler, scaler)]
    rest = None, None, d_in, d_out
    found = kernels.rank_projection(*(t.to(dtype) for t in inputs), *rest)
    return list(found), list(reference.rank_projection(*inputs, *rest))


def _linear(
    tokens: int,
    small: bool,
    dtype: torch.dtype,
    device: torch.device | str,
    form: str | None = None,
) -> Results:
    from csrc_triton.kernels import lora_linear as kernels

    generator = _generator()
    d_in, d_out, rank = (96, 40, 16) if small else (2560, 960, 32)
    density = 0.1 if small else 0.03
    x, weight = (_signs(generator, density, *s, d_in) for s in ((4, tokens), (d_out,)))
    lora_a = _signs(generator, density, 3, rank, d_in)
    lora_b = _signs(generator, 0.25, 3, rank, d_out)
    inputs = [t.to(device) for t in (x, weight, lora_a, lora_b)]
    where = torch.tensor([2, 0, -1, 2], device=device), 1.0, None, None

    def results(module, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, **tiles) -> list[Tensor]:
        y, u = module.lora_linear(x, weight, None, a, b, *where, True, **tiles)
        ones = _sparse_ones(y)
        return [y, u, *module.lora_linear_backward(ones, x, weight, a, b, *where, u, **tiles)]

    config = None if form is None else {"prefill": {"form": form}}
    found = results(kernels, *(t.to(dtype) for t in inputs), config=config)
    return found, results(reference, *inputs)


def _prefill(form: str | None = None) -> Canary:
    return lambda dtype, device, small: _linear(3 if small else 301, small, dtype, device, form)


CANARIES: dict[str, Canary] = {
    "perceiver_attention": _attention,
    "rank_projection": _projection,
    "lora_linear": _prefill(),
    "lora_linear decoding": lambda dtype, device, small: _linear(1, small, dtype, device),
    # Judged by name, not with the op: the tables may not use them.
    "epilogue of lora_linear": _prefill("epilogue"),
    "recompute of lora_linear": _prefill("recompute"),
}
