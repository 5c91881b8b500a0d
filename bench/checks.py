"""Are the Triton kernels right on this device? Against float64 on the CPU, bit for bit twice.

Odd sizes, ragged lengths and ranks, strided inputs, forward and backward, in memory filled with
NaN. A canary of small integers, whose results every dtype represents, must be exact: it guards
against a pipelined product that a compiler got wrong (ptxas before 13.3, triton#9433), at tiles
and lengths of the real shapes. Nothing is timed here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.backends import backend
from csrc_triton import gated_projection, lora_linear, perceiver_attention, rank_projection

Call = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        call: inputs -> outputs.
        inputs: float64 on the CPU.
        wide: those of the inputs that stay float32 when the others are narrower.
    """

    name: str
    call: Call
    inputs: Sequence[Tensor]
    wide: frozenset[int] = frozenset()


def limit(dtype: torch.dtype) -> float:
    """Allowed relative error (Frobenius norm) of two chained products in a dtype.

    Half precision rounds one intermediate and the result; a float32 sum of some hundred terms
    loses some bits. A structural error is 0.2 or more.
    """
    return (64 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps


# --- cases -----------------------------------------------------------------------------------


def cases(generator: torch.Generator) -> list[Case]:
    """Every op at odd sizes: dense, ragged, strided, expanded, decoding."""

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def on(x: Tensor, *values: int) -> Tensor:
        return torch.tensor(values, device=x.device)

    norm = rand(3, 83).abs() + 0.5
    norm[0, 40:] = 0
    norm[1] = 0
    norm[2, :7] = 0
    seen = torch.rand(2, 129, generator=generator) > 0.2
    attention = [rand(3, 40, 64) * 0.1, rand(3, 83, 64), norm]
    # A row that sees nothing has lse = -inf, which no relative error can measure.
    attend = lambda q, c, r: _finite(perceiver_attention(q, c, r))  # noqa: E731
    head = [rand(2, 2, 3, 5, 48), rand(3, 48, 110), rand(3, 5), rand(3, 5), rand(3, 4, 70),
            rand(3, 4, 33)]  # fmt: skip
    project = lambda *t: rank_projection(*t, d_in=70, d_out=33)  # noqa: E731
    linear = [rand(4, 17, 65), rand(33, 65) / 8, rand(33), rand(2, 9, 65) / 8, rand(2, 9, 33)]
    decoding = [linear[0][:, :1], *linear[1:]]
    packed = [rand(46, 65), *linear[1:]]

    def adapted(x: Tensor, *rest: Tensor) -> tuple[Tensor]:
        return (lora_linear(x, *rest, on(x, 1, -1, 0, 1), 0.5),)

    def ragged(x: Tensor, *rest: Tensor) -> tuple[Tensor]:
        index, ranks, offsets = on(x, 1, 0, -1, 1, 0), on(x, 3, 9), on(x, 0, 17, 17, 20, 41, 46)
        return (lora_linear(x, *rest, index, 0.5, ranks=ranks, offsets=offsets),)

    def gated(x: Tensor, *rest: Tensor) -> tuple[Tensor]:
        return (gated_projection(x, seen.to(x.device), *rest),)

    norms = frozenset([2])
    found = [
        Case("perceiver_attention ragged", attend, attention, norms),
        Case("perceiver_attention strided", attend, _strided(attention), norms),
        Case(
            "perceiver_attention expanded",
            lambda q, c, r: attend(q.expand(3, -1, -1), c, r),
            [attention[0][:1], *attention[1:]],
            norms,
        ),
        Case(
            "perceiver_attention long",
            attend,
            [rand(1, 128, 512) * 0.05, rand(1, 300, 512), rand(1, 300).abs() + 0.5],
            norms,
        ),
        Case("rank_projection", project, head),
        Case("rank_projection strided", project, _strided(head)),
        Case("rank_projection without bias", project, head[:4]),
        Case("lora_linear", adapted, linear),
        Case("lora_linear strided", adapted, _strided(linear)),
        Case("lora_linear ragged packed", ragged, packed),
        Case("lora_linear decoding", adapted, decoding),
        Case("lora_linear decoding strided", adapted, _strided(decoding)),
        Case("gated_projection", gated,
             [rand(2, 129, 40), rand(96, 40) / 6, rand(96, 40) / 6, rand(24, 96) / 10]),
    ]  # fmt: skip
    return found


def _finite(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.where(t == -math.inf, 0.0, t) for t in outputs)


def _strided(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The same values, last two axes transposed in memory; a vector takes every second slot."""
    return [
        t.mT.contiguous().mT if t.dim() > 1 else t.repeat_interleave(2)[::2] for t in inputs
    ]


def check(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[dict[str, Any]]:
    """A row for each case and dtype: error, limit, and whether a second run gave the same bits."""
    for case in cases(torch.Generator().manual_seed(0)):
        for dtype in dtypes:
            yield guarded(case.name, dtype, lambda c=case, d=dtype: _check(c, device, d))


def guarded(
    name: str, dtype: torch.dtype, body: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The row of ``body``; a kernel that does not compile or launch fails its own row only."""
    row = {"name": name, "dtype": str(dtype).removeprefix("torch.")}
    try:
        row |= body()
    except Exception as error:
        text = (str(error).strip() or repr(error)).splitlines()[0][:200]
        row |= {"passed": False, "reason": f"{type(error).__name__}: {text}"}
    return row


def _check(case: Case, device: str, dtype: torch.dtype) -> dict[str, Any]:
    placed = [_rounded(t, dtype, i in case.wide) for i, t in enumerate(case.inputs)]
    with backend("reference"):
        oracle = _run(case.call, [t.double() for t in placed], "cpu")
        plain = _run(case.call, placed, device)
    if device == "cuda":
        # What compiles at the first call does so in ordinary memory.
        with backend("triton"):
            _run(case.call, placed, device)
    with backend("triton"), poisoned():
        first, again = (_run(case.call, placed, device) for _ in range(2))
    pairs = list(zip(first, oracle, strict=True))
    error = max(relative_error(found, wanted) for found, wanted in pairs)
    rounding = max(relative_error(p, wanted) for p, wanted in zip(plain, oracle, strict=True))
    allowed = max(limit(dtype), 2 * rounding)
    # A single wrong element hardly shows in a norm.
    worst = max(largest_error(found, wanted) for found, wanted in pairs)
    same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    return {
        "error": json_number(error),
        "limit": allowed,
        "largest_error": json_number(worst),
        "repeatable": same,
        "passed": error <= allowed and worst <= 4 * allowed and same,
    }


def _rounded(t: Tensor, dtype: torch.dtype, wide: bool) -> Tensor:
    """A detached copy of the values a dtype holds, of the same strides."""
    narrow = torch.float32 if wide else dtype
    copy = torch.empty_strided(t.shape, t.stride(), dtype=narrow)
    return copy.copy_(t)


def _run(call: Call, inputs: Sequence[Tensor], device: str) -> list[Tensor]:
    """Outputs and the gradients of all inputs that get one, in float64 on the CPU."""
    placed = [t.detach().to(device).requires_grad_() for t in inputs]
    outputs = call(*placed)
    # Not random and not contiguous: the same rounding in every dtype, and a layout to honor.
    cotangents = [_cotangent(t) for t in outputs]
    grads = torch.autograd.grad(outputs, placed, cotangents, allow_unused=True)
    found = [t.detach().double().cpu() for t in (*outputs, *grads) if t is not None]
    return found


def _cotangent(t: Tensor) -> Tensor:
    wave = torch.cos(torch.arange(t.numel(), dtype=torch.float32)).view(t.shape).to(t)
    return _strided([wave])[0]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """What torch leaves uninitialized is NaN inside."""

    def filled(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_and_fill(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return allocate_and_fill

    with contextlib.ExitStack() as stack:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch.Tensor, "new_empty"),
        ):
            patched = mock.patch.object(owner, name, filled(getattr(owner, name)))
            stack.enter_context(patched)
        yield


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Of the Frobenius norm; inf when something is not finite."""
    if not torch.isfinite(found).all():
        return math.inf
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).norm() / wanted.norm().clamp_min(1e-300)).item()


def largest_error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest element; inf when something is not finite."""
    if not torch.isfinite(found).all():
        return math.inf
    if not found.numel():
        return 0.0
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-300)).item()


def json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --- canary ----------------------------------------------------------------------------------

# bfloat16 holds every integer up to here.
LARGEST_INTEGER = 256


def canary(device: str, dtypes: Sequence[torch.dtype], small: bool) -> Iterator[dict[str, Any]]:
    """Sums of small integers at the 500M shape: every bit must be right.

    For half precision, whose products run on tensor cores; ``small`` is for the interpreter.
    """
    bodies = {
        "canary perceiver_attention": _attention_canary,
        "canary rank_projection": _projection_canary,
        "canary lora_linear": _linear_canary,
        "canary lora_linear decoding": _decoding_canary,
    }
    for name, body in bodies.items():
        for dtype in dtypes:
            if dtype != torch.float32:
                yield guarded(name, dtype, lambda b=body, d=dtype: _exact(b, device, d, small))


def _exact(
    body: Callable[[torch.Generator, bool], tuple[Call, list[Tensor]]],
    device: str,
    dtype: torch.dtype,
    small: bool,
) -> dict[str, Any]:
    call, inputs = body(torch.Generator().manual_seed(1), small)
    with backend("reference"):
        exact = _integers(call, [t.double() for t in inputs], "cpu")
    with backend("triton"), poisoned():
        found = _integers(call, [t.to(dtype) for t in inputs], device)
    # A probability that is 0 in every narrower dtype is 1e-80 in float64.
    wanted = [t.round() for t in exact]
    for t, e in zip(wanted, exact, strict=True):
        if (t - e).abs().max() > 1e-9 or t.abs().max() > LARGEST_INTEGER:
            return {"passed": False, "reason": "the expected values are no small integers"}
    wrong = sum(int((f != w).sum()) for f, w in zip(found, wanted, strict=True))
    row: dict[str, Any] = {"limit": 0.0, "wrong_elements": wrong, "passed": wrong == 0}
    # Absolute: a gradient here is 0 everywhere.
    worst = max((f - w).abs().max().item() for f, w in zip(found, wanted, strict=True))
    return {**row, "error": json_number(worst)}


def _integers(call: Call, inputs: Sequence[Tensor], device: str) -> list[Tensor]:
    """Outputs and gradients for a cotangent that is 1 in every 61st slot and 0 elsewhere."""
    placed = [t.detach().to(device).requires_grad_() for t in inputs]
    outputs = call(*placed)
    ones = [(torch.arange(t.numel()) % 61 == 0).view(t.shape).to(t) for t in outputs]
    grads = torch.autograd.grad(outputs, placed, ones, allow_unused=True)
    return [t.detach().double().cpu() for t in (*outputs, *grads) if t is not None]


def _signs(generator: torch.Generator, density: float, *shape: int) -> Tensor:
    """-1, 0 and 1; the share of those that are not 0 is ``density``."""
    drawn = torch.rand(*shape, generator=generator)
    return (drawn < density / 2).float() - (drawn > 1 - density / 2).float()


def _attention_canary(generator: torch.Generator, small: bool) -> tuple[Call, list[Tensor]]:
    """Each query is a token of the context, whose score is so far above all others that its
    probability is exactly 1 and theirs 0; tokens of all tiles are chosen."""
    slices, rows, tokens, width = (1, 16, 64, 256) if small else (4, 128, 1024, 512)
    context = _signs(generator, 1.0, slices, tokens, width)
    chosen = torch.arange(rows) * (tokens // rows) + 1
    query = context[:, chosen]

    def call(q: Tensor, c: Tensor) -> tuple[Tensor]:
        ones = torch.ones(slices, tokens, dtype=torch.promote_types(q.dtype, torch.float32),
                          device=q.device)  # fmt: skip
        return (perceiver_attention(q, c, ones)[0],)

    return call, [query, context]


def _projection_canary(generator: torch.Generator, small: bool) -> tuple[Call, list[Tensor]]:
    """Latents of norm 4 and scalers of 4: sums of signs, forward only (the norm's gradient is
    not integer)."""
    layers, depth, d_in, d_out = (1, 64, 40, 24) if small else (8, 512, 2560, 960)
    order = torch.rand(1, 1, layers, 16, depth, generator=generator).argsort(-1)
    latents = (order < 16).float() * (1 - 2 * (order % 2)).float()
    scaler = torch.full((layers, 16), 4.0)

    def call(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        s = scaler.to(x)
        return rank_projection(x.detach(), w, s, s, d_in=d_in, d_out=d_out)

    return call, [latents, _signs(generator, 1.0, layers, depth, d_in + d_out)]


def _linear_canary(generator: torch.Generator, small: bool) -> tuple[Call, list[Tensor]]:
    return _linear_inputs(generator, small, 3 if small else 301)


def _decoding_canary(generator: torch.Generator, small: bool) -> tuple[Call, list[Tensor]]:
    return _linear_inputs(generator, small, 1)


def _linear_inputs(
    generator: torch.Generator, small: bool, tokens: int
) -> tuple[Call, list[Tensor]]:
    d_in, d_out, rank = (96, 40, 16) if small else (2560, 960, 32)
    density = 0.1 if small else 0.03
    x, w = _signs(generator, density, 4, tokens, d_in), _signs(generator, density, d_out, d_in)
    a, b = _signs(generator, density, 3, rank, d_in), _signs(generator, 0.25, 3, rank, d_out)

    def call(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor]:
        index = torch.tensor([2, 0, -1, 2], device=x.device)
        return (lora_linear(x, w, None, a, b, index, 1.0),)

    return call, [x, w, a, b]
