"""Are the Triton kernels right on this device? Against float64 on the CPU, bit for bit twice.

Odd sizes, ragged lengths and ranks, strided inputs, forward and backward, in memory filled with
NaN; and the self-checks on small integers (csrc_triton/self_check.py), at tiles and lengths of the
real shapes. Nothing is timed here.
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
from bench.forms import in_form
from csrc_triton import gated_projection, lora_linear, perceiver_attention, rank_projection
from csrc_triton.lora_linear import op as lora_linear_op
from csrc_triton.perceiver_attention import op as perceiver_attention_op
from csrc_triton.rank_projection import op as rank_projection_op

Call = Callable[..., tuple[Tensor, ...]]
FORMS = ("expand", "epilogue", "recompute")
SELF_CHECKS = {
    f"{m.OP.name} {name}": (m.OP, name)
    for m in (perceiver_attention_op, rank_projection_op, lora_linear_op)
    for name in m.OP.self_checks
}


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

    def formed(form: str) -> Call:
        run = in_form(form)
        return lambda x, *rest: (run(x, *rest, on(x, 1, -1, 0, 1), 0.5),)

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
        *(Case(f"lora_linear {f} strided", formed(f), _strided(linear)) for f in FORMS[1:]),
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
    return [t.mT.contiguous().mT if t.dim() > 1 else t.repeat_interleave(2)[::2] for t in inputs]


@dataclass(frozen=True)
class Job:
    """A case or a canary in one dtype; it can be sent to another process."""

    name: str
    dtype: torch.dtype
    canary: bool = False

    def __str__(self) -> str:
        kind = "canary " if self.canary else ""
        return f"{kind}{self.name} {str(self.dtype).removeprefix('torch.')}"


def jobs(dtypes: Sequence[torch.dtype]) -> list[Job]:
    """All checks, dtype by dtype; canaries first, in half precision, whose products they guard."""
    names = [case.name for case in cases(torch.Generator().manual_seed(0))]
    found = []
    for dtype in dtypes:
        if dtype != torch.float32:
            found += [Job(name, dtype, canary=True) for name in SELF_CHECKS]
        found += [Job(name, dtype) for name in names]
    return found


def check(job: Job, device: str) -> dict[str, Any]:
    """A job's row: what is wrong, or error, limit and whether a second run gave the same bits."""
    row = {"name": str(job).rpartition(" ")[0], "dtype": str(job.dtype).removeprefix("torch.")}
    if job.canary:
        return row | guarded(lambda: _canary(job.name, device, job.dtype))
    found = {case.name: case for case in cases(torch.Generator().manual_seed(0))}
    return row | guarded(lambda: _check(found[job.name], device, job.dtype))


def guarded(body: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``body`` finds; a kernel that does not compile or launch fails its own row only."""
    try:
        return body()
    except Exception as error:
        text = (str(error).strip() or repr(error)).splitlines()[0][:200]
        return {"passed": False, "reason": f"{type(error).__name__}: {text}"}


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


def _canary(name: str, device: str, dtype: torch.dtype) -> dict[str, Any]:
    with backend("triton"), poisoned():
        op, check = SELF_CHECKS[name]
        wrong = op.wrong_elements(check, dtype, torch.device(device), small=device == "cpu")
    return {"limit": 0.0, "wrong_elements": wrong, "passed": wrong == 0}
