"""Every op at the 500M and 2.2B shapes against a ladder of baselines, on the same data.

The variants of a row: ``released`` (the op order of the released code, bench/released.py),
``reference`` (the op's reference.py), ``plain`` (the best plain PyTorch we know, at the end of this
file), ``compiled`` (the same under torch.compile), ``merged`` (the adapter merged into W) and
``bare`` (the linear layer without an adapter) where they mean something, kernels of other projects
where they are installed (``bench.outside``), and ``ours``. Decoding is timed as CUDA graphs.

Ours is first compared with float64 on the same device; a wrong result gets no speed-up. Two front
ends measure these rows: bench/test_ops.py with pytest-benchmark, and bench/runs/gpu.py, which has
to end within a few minutes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import outside, released
from bench.harness import (
    backend,
    captured,
    error_limit,
    first_line,
    json_number,
    median_seconds,
    relative_error,
)
from csrc_triton import gated_projection, lora_linear, perceiver_attention, rank_projection
from csrc_triton.device import peak_of
from v2l_fast.hypernet.config import HypernetConfig
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.hypernet.perceiver import PerceiverAttention, inverse_rms

HEADS = (16, 4, 128)
SIZES = ("tiny", "cpu", "gpu")

Outputs = Tensor | tuple[Tensor, ...]
Function = Callable[..., Outputs]


@dataclass
class Row:
    """One op at one shape in one direction.

    Attributes:
        functions: variant -> function of ``inputs``; one of them is "ours". On a device without
            Triton kernels, ours is what the op does there.
        flops, bytes: of the operation, 0 if not known.
        needs: indices of the inputs that get gradients; empty for forward only.
        oracle: the function for float64 inputs; None for "ours" under the reference backend.
        sliced: inputs of shape [N, ...] of which only the first and last slice are compared with
            float64.
        graphed: time as CUDA graphs, except the variants in ``eager``, which wait for the device.
        compiled: whether "plain" is also timed under torch.compile.
        tolerance: factor of the dtype's error limit.
        bare: variants that compute less than the op does, for scale; they get no speed-up.
        outside: variants of other projects (``bench.outside``), compared with float64 like ours.
    """

    op: str
    shape: str
    functions: Mapping[str, Function]
    inputs: Sequence[Tensor]
    flops: float = 0.0
    bytes: float = 0.0
    needs: Sequence[int] = ()
    oracle: Function | None = None
    sliced: Sequence[int] = ()
    graphed: bool = False
    eager: frozenset[str] = frozenset()
    compiled: bool = True
    tolerance: float = 1.0
    note: str = ""
    bare: frozenset[str] = frozenset({"bare"})
    outside: frozenset[str] = frozenset()
    grads: list[Tensor] = field(default_factory=list)
    exact: list[Tensor] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape} {self.direction}"

    @property
    def direction(self) -> str:
        return "forward+backward" if self.needs else "forward"

    @property
    def allowed_error(self) -> float:
        """Limit of the relative error against float64."""
        return self.tolerance * error_limit(self.inputs[0].dtype)

    def with_compiled(self) -> dict[str, Function]:
        """The variants, with "plain" compiled as one more where that is wanted."""
        functions = dict(self.functions)
        if self.compiled and "plain" in functions:
            torch._dynamo.reset()
            functions["compiled"] = torch.compile(functions["plain"], dynamic=False)
        return functions


# --- measuring -------------------------------------------------------------------------------


def measure(row: Row, device: str, seconds: float, compile_plain: bool) -> dict[str, Any]:
    """The row as a record: error, median seconds of each variant, rates, speed-ups of ours."""
    record: dict[str, Any] = {
        "op": row.op, "shape": row.shape, "direction": row.direction,
        "seconds": {}, "failures": {}, "passed": False,
    }  # fmt: skip
    if row.note:
        record["note"] = row.note
    functions = row.with_compiled() if compile_plain else row.functions
    with backend("triton" if device == "cuda" else "reference"):
        try:
            error = row_error(row)
        except Exception as failure:
            return record | {"reason": first_line(failure)}
        passed = error <= row.allowed_error
        record |= {"error": json_number(error), "limit": row.allowed_error, "passed": passed}
        if not passed:
            return record
        calls = {}
        for name, function in functions.items():

            def call(f: Function = function) -> list[Tensor]:
                return run(row, f)

            try:
                error = row_error(row, function) if name in row.outside else 0.0
                if error > row.allowed_error:
                    raise ValueError(f"relative error {error:.1e}, limit {row.allowed_error:.1e}")
                call()
                calls[name] = as_timed(row, name, call, device)
            except Exception as failure:
                # A baseline that does not fit or compile is an entry of the table, not a failure.
                record["failures"][name] = first_line(failure)
                if device == "cuda":
                    torch.cuda.empty_cache()
        record["seconds"] = times = median_seconds(calls, device, seconds)
    if "ours" not in times:
        return record | {"passed": False, "reason": record["failures"]["ours"]}
    record["speedups"] = {
        name: taken / times["ours"]
        for name, taken in times.items()
        if name != "ours" and name not in row.bare
    }
    return record | rates(row, times["ours"], device)


def as_timed(row: Row, name: str, call: Callable[[], object], device: str) -> Callable:
    """The call, or its CUDA graph if the row is timed as one."""
    graphed = row.graphed and device == "cuda" and name not in row.eager
    return captured(call) if graphed else call


def run(row: Row, function: Function) -> list[Tensor]:
    """Outputs of a variant, and the gradients of the inputs that get one."""
    if not row.needs:
        with torch.no_grad():
            return _listed(function(*row.inputs))
    wanted = [row.inputs[i] for i in row.needs]
    for tensor in wanted:
        tensor.requires_grad_()
    outputs = _listed(function(*row.inputs))[:1]
    if not row.grads:
        generator = torch.Generator(outputs[0].device).manual_seed(1)
        shape, like = outputs[0].shape, outputs[0]
        row.grads = [
            torch.randn(shape, generator=generator, device=like.device, dtype=torch.float32)
        ]
    cotangents = [row.grads[0].to(outputs[0].dtype)]
    grads = torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True)
    return [*outputs, *(g for g in grads if g is not None)]


def _listed(outputs: Outputs) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def row_error(row: Row, function: Function | None = None) -> float:
    """Largest relative error of a variant's (or our) outputs and gradients against float64."""
    ours = [t.detach() for t in run(row, function or row.functions["ours"])]
    if not row.exact:
        row.exact = _exact(row)
    if row.sliced:
        ours = [_ends(t) for t in ours]
    return max(relative_error(o, w) for o, w in zip(ours, row.exact, strict=True))


def _exact(row: Row) -> list[Tensor]:
    """Outputs and gradients in float64, of the first and the last slice where there are many."""
    inputs = [
        (_ends(t) if i in row.sliced else t).detach().double() if t.is_floating_point() else t
        for i, t in enumerate(row.inputs)
    ]
    wide = copy.copy(row)
    wide.inputs = inputs
    wide.grads = [_ends(g) if row.sliced else g for g in row.grads]
    with backend("reference"):
        exact = run(wide, row.oracle or row.functions["ours"])
    return [t.detach() for t in exact]


def _ends(t: Tensor) -> Tensor:
    return t[[0, -1]] if len(t) > 1 else t


def rates(row: Row, seconds: float, device: str) -> dict[str, float]:
    """FLOPs and bytes, and both per second; on a known GPU the share of its roofline."""
    if not row.flops:
        return {}
    record = {
        "flops": row.flops,
        "bytes": row.bytes,
        "gb_per_second": row.bytes / seconds / 1e9,
        "tflop_per_second": row.flops / seconds / 1e12,
    }
    peak = peak_of(torch.cuda.get_device_name()) if device == "cuda" else None
    if peak is not None:
        record["roofline_share"] = peak.floor(row.flops, row.bytes) / seconds
    return record


# --- rows ------------------------------------------------------------------------------------


def rows(device: str, dtype: torch.dtype, size: str) -> Iterator[Callable[[], Row]]:
    """Makers of rows, the most important first; a row's data exist only while it is measured.

    Args:
        size: one of ``SIZES``: a trial, shapes that take a CPU seconds, or the released models'
            shapes in batches that fill a GPU.
    """
    make = _Maker(device, dtype)
    if size == "tiny":
        yield lambda: make.attention("tiny", 2, 40, 16, 32, False)
        yield lambda: make.attention("tiny", 2, 40, 16, 32, True)
        yield lambda: make.block("tiny", 2, 24, 64, (4, 2, 8), False)
        yield lambda: make.block("tiny", 2, 24, 64, (4, 2, 8), True)
        yield lambda: make.projection("tiny", 2, 32, 24, 16)
        yield lambda: make.linear("tiny", 3, 5, 3, 8, 24, 16, True)
        yield lambda: make.linear("tiny decoding", 3, 1, 1, 8, 24, 16, False)
        yield lambda: make.gated("tiny", 33, 16, 8)
        return
    if size == "cpu":
        for tokens in (1, 32, 832):
            for adapters in (1, 8):
                label = f"500M E 8 T {tokens} n {adapters}"
                shape = (8, tokens, adapters, 32, 2560, 960)
                yield lambda a=(label, *shape): make.linear(*a, False)
                if tokens > 1:
                    yield lambda a=(label, *shape): make.linear(*a, True)
        for training in (False, True):
            shape = ("N 1 S 832", 1, 832)
            yield lambda a=shape, t=training: make.attention(*a, 128, 512, t)
            yield lambda a=shape, t=training: make.block(*a, 512, HEADS, t)
        yield lambda: make.projection("500M B 1", 1, 512, 2560, 960)
        yield lambda: make.gated("500M 832 tokens", 832, 960, 512)
        yield lambda: make.hypernetwork("500M S 64", 64)
        return
    for training in (False, True):
        for slices, tokens in ((1536, 832), (32, 65536)):
            name = f"N {slices} S {tokens}"
            yield lambda a=(name, slices, tokens), t=training: make.attention(*a, 128, 512, t)
            yield lambda a=(name, slices, tokens), t=training: make.block(*a, 512, HEADS, t)
    for name, d_in, d_out in (("500M", 2560, 960), ("2.2B", 8192, 2048)):
        for examples, adapters in ((32, 32), (1, 1), (8, 1), (64, 64)):
            label = f"{name} decoding E {examples} n {adapters}"
            yield lambda a=(label, examples, 1, adapters, 32, d_in, d_out): make.linear(*a, False)
        label = f"{name} E 32 T 256 n 8"
        yield lambda a=(label, 32, 256, 8, 32, d_in, d_out): make.linear(*a, True)
    for name, d_in, d_out in (("500M", 2560, 960), ("2.2B", 8192, 2048)):
        for batch in (1, 8):
            yield lambda a=(f"{name} B {batch}", batch, 512, d_in, d_out): make.projection(*a)
    yield lambda: make.hypernetwork("500M S 832", 832)
    yield lambda: make.hypernetwork("500M S 4096", 4096)
    yield lambda: make.gated("500M 32,768 tokens", 32768, 960, 512)
    yield lambda: make.gated("2.2B 32,768 tokens", 32768, 2048, 512)
    for tokens in (832, 4096):
        name = f"N 1 S {tokens}"
        yield lambda a=(name, 1, tokens): make.attention(*a, 128, 512, False)


class _Maker:
    """Random data of one device and dtype, and the rows on it."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.size = dtype.itemsize

    def rand(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=self.device, dtype=torch.float32) * scale).to(self.dtype)

    def attention(self, name: str, n: int, s: int, p: int, z: int, training: bool) -> Row:
        torch.manual_seed(0)
        context, query = self.rand(n, s, z), self.rand(n, p, z, scale=z**-0.5)
        others = {} if training else outside.perceiver_attention(query, context)
        return Row(
            "perceiver_attention", name,
            {
                "reference": _under_reference(perceiver_attention),
                "plain": plain_perceiver_attention,
                **others,
                "ours": perceiver_attention,
            },
            [query, context, inverse_rms(context)],
            outside=frozenset(others),
            flops=(14 if training else 4) * n * p * s * z,
            bytes=self.size * ((3 if training else 1) * n * s * z + (5 if training else 2) * n * p
                               * z),
            needs=(0, 1, 2) if training else (),
            sliced=(0, 1, 2),
        )  # fmt: skip

    def block(
        self, name: str, n: int, s: int, z: int, heads: tuple[int, int, int], training: bool
    ) -> Row:
        """The whole attention of a block; the released order is known for no smaller part."""
        torch.manual_seed(0)
        module = PerceiverAttention(z, *heads).to(self.device, self.dtype)
        module.requires_grad_(False)
        wide = copy.deepcopy(module).double()
        context = self.rand(n, s, z)
        inputs = [self.rand(n, 8, z), context, self.rand(z, scale=0.1) + 1]
        inv_rms = None if training else inverse_rms(context)

        def ours(latents: Tensor, context: Tensor, weight: Tensor) -> Tensor:
            norm = inverse_rms(context) if inv_rms is None else inv_rms
            out = module(latents.float(), context.dtype, weight, context, norm)
            return out.to(latents.dtype)

        def oracle(latents: Tensor, context: Tensor, weight: Tensor) -> Tensor:
            return wide(latents, torch.float64, weight, context, inverse_rms(context))

        def theirs(latents: Tensor, context: Tensor, weight: Tensor) -> Tensor:
            return released.cross_attention(
                dict(module.named_parameters()), weight, heads, latents, context
            )

        return Row(
            "cross-attention block", name,
            {"released": theirs, "reference": _under_reference(ours), "ours": ours},
            inputs,
            needs=(0, 1) if training else (),
            oracle=oracle, sliced=(0, 1), tolerance=2.0,
            note="" if training else "without 1/rms of the context, which nine blocks share",
        )  # fmt: skip

    def projection(self, name: str, batch: int, z: int, d_in: int, d_out: int) -> Row:
        torch.manual_seed(0)
        rank, width = 16, d_in + d_out
        inputs = [
            self.rand(batch, rank, z), self.rand(z, width, scale=0.02),
            self.rand(rank), self.rand(rank),
        ]  # fmt: skip
        sizes = {"d_in": d_in, "d_out": d_out}
        ours = partial(rank_projection, **sizes)
        num_rows = batch * rank
        return Row(
            "rank_projection", name,
            {
                "released": partial(released.rank_projection, **sizes),
                "reference": _under_reference(ours),
                "plain": partial(plain_rank_projection, **sizes),
                "ours": ours,
            },
            inputs,
            flops=2 * num_rows * z * width,
            bytes=self.size * (z * width + num_rows * z + num_rows * width),
            graphed=True,
        )  # fmt: skip

    def linear(
        self, name: str, examples: int, tokens: int, adapters: int, rank: int, d_in: int,
        d_out: int, training: bool,
    ) -> Row:  # fmt: skip
        torch.manual_seed(0)
        scale = 128.0
        a = self.rand(adapters, rank, d_in, scale=d_in**-0.5)
        b = self.rand(adapters, rank, d_out, scale=1 / scale)
        inputs = [self.rand(examples, tokens, d_in), self.rand(d_out, d_in, scale=d_in**-0.5), a, b]
        index = torch.arange(examples, device=self.device) * adapters // examples
        questions = examples // adapters
        functions: dict[str, Function] = {
            "released": lambda x, w, a, b: released.lora_linear(x, w, a, b, questions, scale),
            "reference": _under_reference(
                lambda x, w, a, b: lora_linear(x, w, None, a, b, index, scale)
            ),
            "plain": lambda x, w, a, b: plain_lora_linear(x, w, a, b, index, scale),
            "bare": lambda x, w, a, b: F.linear(x, w),
            "ours": lambda x, w, a, b: lora_linear(x, w, None, a, b, index, scale),
        }
        others = {}
        if not training and examples % adapters == 0:
            others = outside.lora_linear(inputs[1], a, b, index, tokens, scale)
            functions |= others
        if adapters == 1 and not training:
            merged = (inputs[1].float() + scale * (b[0].float().mT @ a[0].float())).to(self.dtype)
            functions["merged"] = lambda x, w, a, b: F.linear(x, merged)
        num_rows = examples * tokens
        passes = 3 if training else 1
        base = 2 * num_rows * d_in * d_out * (2 if training else 1)
        low_rank = 2 * num_rows * rank * (d_in + d_out) * passes
        moved = d_in * d_out * (2 if training else 1) + adapters * rank * (d_in + d_out) * passes
        return Row(
            "lora_linear", name, functions, inputs,
            flops=base + low_rank,
            bytes=self.size * (moved + num_rows * (d_in + d_out) * (2 if training else 1)),
            needs=(0, 2, 3) if training else (),
            # The reference searches for the rows of each adapter, which waits for the device.
            # PEFT's mixed batch copies indices from the host.
            graphed=not training, eager=frozenset({"reference", "peft"}), tolerance=2.0,
            outside=frozenset(others),
            compiled=name.startswith("500M"),
        )  # fmt: skip

    def gated(self, name: str, tokens: int, d: int, z: int) -> Row:
        torch.manual_seed(0)
        x, (gate, up) = self.rand(tokens, d), (self.rand(4 * d, d, scale=d**-0.5) for _ in "gu")
        down = self.rand(z, 4 * d, scale=(4 * d) ** -0.5)
        others = outside.gated_projection(gate, up)
        return Row(
            "gated_projection", name,
            {
                "released": lambda x, g, u, d: released.swiglu(g, u, d, x),
                "reference": _under_reference(
                    lambda x, g, u, d: gated_projection(x, None, g, u, d)
                ),
                "plain": plain_gated_projection,
                **others,
                "ours": lambda x, g, u, d: gated_projection(x, None, g, u, d),
            },
            [x, gate, up, down], outside=frozenset(others),
            flops=2 * tokens * 4 * d * (2 * d + z),
            bytes=self.size * (tokens * (d + z) + 4 * d * (2 * d + z)),
        )  # fmt: skip

    def hypernetwork(self, name: str, tokens: int) -> Row:
        """All layers of one video at once, as the released code does it."""
        torch.manual_seed(0)
        network = HyperNetwork(HypernetConfig(960, 32, {"down_proj": (2560, 960)}))
        with torch.no_grad():
            network.scaler_B["down_proj"].normal_()
        network = network.to(self.device, self.dtype).eval().requires_grad_(False)
        wide = copy.deepcopy(network).double()

        def ours(features: Tensor) -> Outputs:
            batch = network(features)
            return batch.A["down_proj"], batch.B["down_proj"]

        def of(network: HyperNetwork) -> Function:
            def theirs(features: Tensor) -> Outputs:
                a, b = released.hypernetwork(network, features)
                return a["down_proj"], b["down_proj"]

            return theirs

        return Row(
            "hypernetwork", name,
            {"released": of(network), "reference": _under_reference(ours), "ours": ours},
            # Nine blocks and three more layers deep.
            [self.rand(1, 32, tokens, 960)], oracle=of(wide), tolerance=4.0,
        )  # fmt: skip


def _under_reference(function: Function) -> Function:
    def call(*inputs: Tensor) -> Outputs:
        with backend("reference"):
            return function(*inputs)

    return call


# --- the best plain PyTorch ----------------------------------------------------------------------
# In the inputs' dtype, with the fewest passes that torch allows: what a kernel has to beat. An op's
# reference.py is its meaning, and computes in float32 or wider.


def plain_perceiver_attention(
    query: Tensor, context: Tensor, inv_rms: Tensor
) -> tuple[Tensor, Tensor]:
    """The absorbed form: two batched products around a softmax; all tokens visible."""
    scores = torch.bmm(query, context.mT).float() * inv_rms[:, None]
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse[..., None]) * inv_rms[:, None]
    return torch.bmm(weights.to(query.dtype), context), lse


def plain_rank_projection(
    latents: Tensor, head: Tensor, scaler_a: Tensor, scaler_b: Tensor, *, d_in: int, d_out: int
) -> tuple[Tensor, Tensor]:
    """As ``released.rank_projection``, in one product of two matrices."""
    a, b = (F.normalize(latents, dim=-1) @ head).split([d_in, d_out], -1)
    return a * scaler_a[:, None], b * scaler_b[:, None]


def plain_lora_linear(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, index: Tensor, scale: float
) -> Tensor:
    """Gathered adapters and ``baddbmm``; every example has an adapter."""
    shrunk = torch.bmm(x, lora_a[index].mT) * scale
    return torch.baddbmm(F.linear(x, weight), shrunk, lora_b[index])


def plain_gated_projection(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """gate and up as one product."""
    gated, raised = F.linear(x, torch.cat([gate, up])).chunk(2, -1)
    return F.linear(F.silu(gated) * raised, down)
