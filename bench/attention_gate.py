"""Is a form of attend that nobody has run right? Every case, before the tuner may select it.

A tile that ships was tested in Triton's interpreter; one in Gluon was not. So each is compared here
with the reference, row by row, in both half precisions: ragged and masked contexts, row tiles that
are not full, one split and several, either reference of the softmax and the launch that repeats
programs, strides, and the size that the tuner times. Every case runs several times, and its bits
must not change, which a race between warps would make them do.

    python -m bench.attention_gate 512 '{"BLOCK_P": 64, "BLOCK_S": 64, "VAR": 2, "num_warps": 8,
                                         "num_stages": 2, "GLUON": 1}'

prints what is wrong, a line for each case; exit status 1 if anything is.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.harness import error_limit
from csrc_triton.perceiver_attention import reference

# Of the same call, whose bits are compared.
REPEATS = 20
DTYPES = (torch.bfloat16, torch.float16)
# Number of splits, and whether the reference of the softmax is fixed.
PLANS = ((1, False), (1, True), (3, False), (3, True))


@dataclass(frozen=True)
class GateCase:
    """Inputs in float32 on the device.

    Attributes:
        plans: as ``kernels.perceiver_attention`` takes them.
    """

    name: str
    query: Tensor
    context: Tensor
    norm: Tensor
    plans: tuple[tuple[int, bool], ...] = PLANS


def cases(width: int, device: str, large: bool = True) -> Iterator[GateCase]:
    """Every case of a width; ``large``: those of hundreds of slices and tokens, too."""

    def inputs(n: int, p: int, s: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(n + p + s)
        options = {"generator": generator, "device": device}
        query = torch.randn(n, p, width, **options) / width**0.5
        norm = torch.rand(n, s, **options) + 0.5
        return query, torch.randn(n, s, width, **options), norm

    query, context, norm = inputs(3, 130, 200)
    lengths = torch.tensor([200, 0, 65], device=device)
    ragged = norm * (torch.arange(200, device=device) < lengths[:, None])
    ragged[0, 3:90] = 0
    yield GateCase("ragged", query, context, ragged)
    yield GateCase(
        "masked garbage", query, context.masked_fill(ragged[..., None] == 0, 1e4), ragged
    )
    yield GateCase("one row and token", *inputs(2, 1, 1))
    query, context, norm = inputs(4, 64, 96)
    yield GateCase("strides", query[::2, ::3], context[1:3], norm[1:3])
    query, context, norm = inputs(2, 70, 320)
    context[..., 0] = torch.arange(320, device=device) / 8
    query[..., 0] = torch.linspace(-1, 8, 70, device=device)
    yield GateCase("scores that grow", query, context, torch.ones_like(norm))
    if large:
        yield GateCase("many slices", *inputs(264, 128, 832), PLANS[:2])
        yield GateCase("many tokens", *inputs(1, 128, 65_536), ((64, False), (64, True), (7, True)))


def failures(tile: Mapping[str, int], width: int, device: str, large: bool = True) -> list[str]:
    """What is wrong with a tile of ``attend``, one line for each case, dtype and plan."""
    from csrc_triton.perceiver_attention import kernels

    wrong = []
    for case, dtype in itertools.product(cases(width, device, large), DTYPES):
        tensors = case.query.to(dtype), case.context.to(dtype), case.norm
        expected = reference.perceiver_attention(*(tensor.float() for tensor in tensors))
        for plan in case.plans:
            first = kernels.perceiver_attention(*tensors, config=dict(tile), plan=plan)
            problem = difference(first, expected, dtype)
            for _ in range(REPEATS if problem is None else 0):
                again = kernels.perceiver_attention(*tensors, config=dict(tile), plan=plan)
                if not all(torch.equal(a, b) for a, b in zip(again, first, strict=True)):
                    problem = "other bits in a further run"
                    break
            if problem is not None:
                wrong.append(f"{case.name}, {dtype}, splits and fixed {plan}: {problem}")
    return wrong


def difference(
    found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype
) -> str | None:
    """How out or lse differs from the reference's; None within the limit of the dtype.

    Each row of out is judged alone: one wrong row among thousands is no small error.
    """
    (out, lse), (right, right_lse) = found, expected
    if not torch.equal(lse.isneginf(), right_lse.isneginf()):
        return "other rows see nothing"
    if not out.isfinite().all() or lse.isnan().any():
        return "NaN or infinite"
    limit = error_limit(dtype)
    rows = (out.float() - right.float()).norm(dim=-1) / right.float().norm(dim=-1).clamp_min(1e-6)
    if (error := rows.max().item()) > limit:
        return f"relative error of a row {error:.1e}, limit {limit:.1e}"
    seen = ~lse.isneginf()
    size = right_lse[seen].abs().clamp_min(1.0)
    errors = (lse[seen] - right_lse[seen]).abs() / size
    if errors.numel() and (error := errors.max().item()) > limit:
        return f"error of lse {error:.1e}, limit {limit:.1e}"
    return None


def main() -> int:
    width, tile = int(sys.argv[1]), json.loads(sys.argv[2])
    wrong = failures(tile, width, "cuda")
    print("\n".join(wrong), end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
