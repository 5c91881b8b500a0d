"""Triton kernels of lora_linear for training and prefill, and the choice among its forms.

Roofline, 500M shape (d_in 2,560, d_out 960), bf16, rank r, H200 (790 TFLOP/s, 4.3 TB/s measured)
and A100 (312, 2.0). Per token the GEMM over W is 4.9 MFLOP, 6.2 and 15.8 ns. The adapter adds r/700
of the FLOPs and is bound by memory; three forms, chosen by the ``prefill`` entries of
configs.json:

- ``expand``: cuBLAS, shrink, expand. Shrink reads x again (5.1 KB, 1.2 and 2.6 ns), expand reads
  and writes y (3.8 KB, 0.9 and 1.9 ns; 2.4 and 5.1 ns for the gradient of x). The default as long
  as no GPU has timed the others: a Triton GEMM rarely reaches cuBLAS's rate.
- ``epilogue``: shrink, then our GEMM over W with u B as its last step (gemm.py): no second
  pass over y. It pays above 87% of cuBLAS's rate forward, 72% backward, at 4.3 TB/s.
- ``recompute``: the same GEMM computes u beside y, again in every column tile (r/BLOCK_N more
  FLOPs): no second pass over x either. It pays above 84% for tiles of 256 columns at rank 32
  (A100: 89%); at the 2.2B shape above 99% (102%), so never there.

u [tokens, r] is 2 r bytes a token and is kept for the gradient of B, which would otherwise read x
once more. The gradient of x takes the same forms with A and B swapped; those of A and B are two
reductions that read x and dy once each (7.0 KB, 1.6 and 3.5 ns).

Reductions have a fixed order and no atomics. The A operand of every pipelined tl.dot comes from
memory, never from registers that were computed on: pipelined wgmma with such an operand is
miscompiled by ptxas before 13.3.

x and the gradients are viewed as rows, copied only where their strides do not allow it; W and the
adapters are read by their own strides.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from csrc_triton import device
from csrc_triton.aot import SECTIONS, AotCase
from csrc_triton.lora_linear import decode, gemm
from csrc_triton.lora_linear.tiles import (
    OP,
    Config,
    block_of_ranks,
    chosen,
    per_example,
    precision,
    rows_of_tile,
    token_tiles,
    used_rank,
)

FORMS = ("expand", "epilogue", "recompute")
GEMMS = FORMS[1:]

# --- kernels ---------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens", "examples", "adapters"])
def _shrink(
    x, factor, out, index, ranks, offsets, scale,
    tokens, examples, adapters, width, rank,
    stride_xt, stride_xd, stride_fn, stride_fr, stride_fd,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[t, r] = scale * sum_k x[t, k] factor[adapter of t, r, k]; zeros in unused slots."""
    example, first, end = rows_of_tile(tl.program_id(0), offsets, tokens, examples, BLOCK_T)
    if first >= end:
        return
    adapter = tl.load(index + example).to(tl.int64)
    used = used_rank(adapter, ranks, rank, adapters)
    rows = first + tl.arange(0, BLOCK_T)
    slots = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    x_rows = x + rows[:, None] * stride_xt
    f_rows = factor + adapter * stride_fn + slots[None, :] * stride_fr
    total = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    span = tl.where(tl.program_id(1) * BLOCK_R < used, width, 0)
    for start in range(0, span, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_tile = tl.load(
            x_rows + k[None, :] * stride_xd,
            mask=(rows < end)[:, None] & (k < width)[None, :],
            other=0.0,
        )
        f_tile = tl.load(
            f_rows + k[:, None] * stride_fd,
            mask=(slots < used)[None, :] & (k < width)[:, None],
            other=0.0,
        )
        total = tl.dot(x_tile, f_tile.to(x_tile.dtype), total, input_precision=PRECISION)
    # An infinite x times a masked zero is NaN, so unused slots are cleared, not merely masked.
    total = tl.where((slots < used)[None, :], total * scale, 0.0)
    tl.store(
        out + rows[:, None] * rank + slots[None, :],
        total.to(out.dtype.element_ty),
        mask=(rows < end)[:, None] & (slots < rank)[None, :],
    )


@triton.jit(do_not_specialize=["tokens", "examples", "adapters"])
def _expand(
    y, u, factor, index, ranks, offsets,
    tokens, examples, adapters, width, rank,
    stride_fn, stride_fr, stride_fd,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[t, n] += sum_r u[t, r] factor[adapter of t, r, n]; rows without adapter stay untouched."""
    example, first, end = rows_of_tile(tl.program_id(0), offsets, tokens, examples, BLOCK_T)
    if first >= end:
        return
    adapter = tl.load(index + example).to(tl.int64)
    used = used_rank(adapter, ranks, rank, adapters)
    if used <= 0:
        return
    rows = first + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    u_rows = u + rows[:, None] * rank
    f_columns = factor + adapter * stride_fn + columns[None, :] * stride_fd
    delta = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for start in range(0, used, BLOCK_R):
        slots = start + tl.arange(0, BLOCK_R)
        u_tile = tl.load(
            u_rows + slots[None, :],
            mask=(rows < end)[:, None] & (slots < used)[None, :],
            other=0.0,
        )
        f_tile = tl.load(
            f_columns + slots[:, None] * stride_fr,
            mask=(slots < used)[:, None] & (columns < width)[None, :],
            other=0.0,
        )
        delta = tl.dot(u_tile, f_tile.to(u_tile.dtype), delta, input_precision=PRECISION)
    inside = (rows < end)[:, None] & (columns < width)[None, :]
    y_tile = y + rows[:, None] * width + columns[None, :]
    summed = tl.load(y_tile, mask=inside, other=0.0).to(tl.float32) + delta
    tl.store(y_tile, summed.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "adapters", "splits"])
def _reduce(
    u, x, out, order, bounds, ranks, offsets,
    tokens, adapters, splits, width, rank,
    stride_xt, stride_xd,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[split, i, r, n] = sum of u[t, r] x[t, n] over every splits-th block of tokens of i.

    order: examples sorted by adapter; bounds[i], bounds[i + 1]: where those of adapter i stand.
    """
    tiles = tl.cdiv(rank, BLOCK_R)
    adapter = tl.program_id(0) // tiles
    split = tl.program_id(2)
    slots = (tl.program_id(0) % tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    used = used_rank(adapter, ranks, rank, adapters)
    total = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    blocks_before = 0
    for place in range(tl.load(bounds + adapter), tl.load(bounds + adapter + 1)):
        example = tl.load(order + place)
        if offsets is None:
            begin = example.to(tl.int64) * tokens
            end = begin + tokens
        else:
            begin = tl.load(offsets + example).to(tl.int64)
            end = tl.load(offsets + example + 1).to(tl.int64)
        blocks = tl.cdiv(end - begin, BLOCK_T).to(tl.int32)
        own = (split + splits - blocks_before % splits) % splits
        for block in range(own, blocks, splits):
            rows = begin + block * BLOCK_T + tl.arange(0, BLOCK_T)
            u_tile = tl.load(
                u + rows[None, :] * rank + slots[:, None],
                mask=(rows < end)[None, :] & (slots < used)[:, None],
                other=0.0,
            )
            x_tile = tl.load(
                x + rows[:, None] * stride_xt + columns[None, :] * stride_xd,
                mask=(rows < end)[:, None] & (columns < width)[None, :],
                other=0.0,
            )
            total = tl.dot(u_tile, x_tile, total, input_precision=PRECISION)
        blocks_before += blocks
    total = tl.where((slots < used)[:, None], total, 0.0)
    row = (split.to(tl.int64) * adapters + adapter) * rank + slots
    tl.store(
        out + row[:, None] * width + columns[None, :],
        total.to(out.dtype.element_ty),
        mask=(slots < rank)[:, None] & (columns < width)[None, :],
    )


# --- launches --------------------------------------------------------------------------------


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def shrink(
    x: Tensor,
    factor: Tensor,
    adapter_index: Tensor,
    scale: float,
    ranks: Tensor | None,
    offsets: Tensor | None,
    config: Config | None = None,
) -> Tensor:
    """u [rows, r] of x's dtype: scale · x factor_iᵀ for x [rows, d], factor [n, r, d].

    Slots an adapter does not use, and rows of examples without adapter, are zero.
    """
    (adapters, rank, width), examples = factor.shape, adapter_index.numel()
    tokens = per_example(x, adapter_index, offsets)
    tile = chosen("shrink", x, config, tokens=tokens, rank=rank)
    tile["BLOCK_R"] = block_of_ranks(tile["BLOCK_R"], rank)
    out = torch.empty(x.shape[0], rank, dtype=x.dtype, device=x.device)
    packed = offsets is not None
    grid = (
        token_tiles(x.shape[0], examples, tokens, packed, tile["BLOCK_T"]),
        triton.cdiv(rank, tile["BLOCK_R"]),
    )
    _shrink[grid](
        x, factor, out, adapter_index, ranks, offsets, scale,
        tokens, examples, adapters, width, rank,
        *x.stride(), *factor.stride(), PRECISION=precision(x), **tile,
    )  # fmt: skip
    return out


def expand_(
    y: Tensor,
    u: Tensor,
    factor: Tensor,
    adapter_index: Tensor,
    ranks: Tensor | None,
    offsets: Tensor | None,
    config: Config | None = None,
) -> None:
    """y [rows, d] += u factor_i in place, for u [rows, r], factor [n, r, d]; y, u contiguous."""
    (adapters, rank, width), examples = factor.shape, adapter_index.numel()
    tokens = per_example(y, adapter_index, offsets)
    tile = chosen("expand", y, config, tokens=tokens, rank=rank)
    tile["BLOCK_R"] = block_of_ranks(tile["BLOCK_R"], rank)
    packed = offsets is not None
    grid = (
        token_tiles(y.shape[0], examples, tokens, packed, tile["BLOCK_T"]),
        triton.cdiv(width, tile["BLOCK_N"]),
    )
    _expand[grid](
        y, u, factor, adapter_index, ranks, offsets,
        tokens, examples, adapters, width, rank,
        *factor.stride(), PRECISION=precision(u), **tile,
    )  # fmt: skip


def examples_by_adapter(adapter_index: Tensor, adapters: int) -> tuple[Tensor, Tensor]:
    """(order [E], bounds [n + 1]): those of adapter i are order[bounds[i] : bounds[i + 1]]."""
    by_adapter, order = torch.sort(adapter_index, stable=True)
    wanted = torch.arange(adapters + 1, device=order.device, dtype=by_adapter.dtype)
    return order, torch.searchsorted(by_adapter, wanted, out_int32=True)


def reduce(
    u: Tensor,
    x: Tensor,
    factor: Tensor,
    order: Tensor,
    bounds: Tensor,
    ranks: Tensor | None,
    offsets: Tensor | None,
    config: Config | None = None,
) -> Tensor:
    """Gradient of ``factor`` [n, r, d], of its dtype: Σ u[t]ᵀ x[t] over each adapter's tokens.

    u [rows, r] contiguous, x [rows, d]. Few adapters leave most of a GPU idle, so the tokens are
    split, and the parts added in order.
    """
    adapters, rank, width = factor.shape
    tokens = per_example(x, order, offsets)
    tile = chosen("reduce", x, config, tokens=tokens, rank=rank)
    tile["BLOCK_R"] = block_of_ranks(tile["BLOCK_R"], rank)
    columns, programs = triton.cdiv(width, tile["BLOCK_N"]), tile.pop("programs")
    grid = (adapters * triton.cdiv(rank, tile["BLOCK_R"]), columns)
    splits = min(triton.cdiv(programs, grid[0] * grid[1]), triton.cdiv(x.shape[0], tile["BLOCK_T"]))
    parts = torch.empty(
        splits, *factor.shape, device=x.device,
        dtype=factor.dtype if splits == 1 else torch.float32,
    )  # fmt: skip
    _reduce[(*grid, splits)](
        u, x, parts, order, bounds, ranks, offsets,
        tokens, adapters, splits, width, rank,
        *x.stride(), PRECISION=precision(x), **tile,
    )  # fmt: skip
    return parts[0] if splits == 1 else parts.sum(0).to(factor.dtype)


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    adapter_index: Tensor,
    scale: float,
    ranks: Tensor | None,
    offsets: Tensor | None,
    direction: str,
    keep: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y, u): y = x Wᵀ (+ bias) + u up_i, u = scale · x down_iᵀ, by the form of the tables.

    Args:
        x: [T, d]; weight: [N, d]; down: [n, r, d]; up: [n, r, N].
        direction: "forward" or "backward", to choose by.
        keep: whether u [T, r] is wanted; else it may be None.
    """
    form = chosen(
        "prefill", x, config, direction=direction,
        tokens=per_example(x, adapter_index, offsets), rank=up.shape[1],
        width=max(weight.shape),
    )["form"]  # fmt: skip
    where = adapter_index, scale, ranks, offsets
    if form == "recompute":
        fused = gemm.recompute(x, weight, bias, down, up, *where, keep, config)
        if fused is not None:
            return fused
    u = shrink(x, down, *where, config)
    if form == "expand":
        # A fresh tensor of ours, so the adapters may be added to it in place.
        y = F.linear(x, weight, bias)
        expand_(y, u, up, adapter_index, ranks, offsets, config)
        return y, u
    return gemm.epilogue(x, weight, bias, up, u, adapter_index, ranks, offsets, config), u


def lora_linear(
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
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``reference.lora_linear``.

    Up to 64 examples of one token each take the decode kernels, whose GEMM is not cuBLAS: their
    bits differ from a prefill's.

    Args:
        config: by kernel (shrink, expand, epilogue, recompute, decode_shrink, decode_linear) its
            tile sizes, and {"form": ...} by "prefill", instead of configs.json.
    """
    rows = x.reshape(-1, x.shape[-1])
    index, ranks, offsets = (_contiguous(t) for t in (adapter_index, ranks, offsets))
    shape, bias = (*x.shape[:-1], weight.shape[0]), _contiguous(bias)
    if rows.numel() == 0 or lora_a.numel() == 0:
        u = rows.new_zeros(rows.shape[0] if keep else 0, lora_a.shape[1])
        return F.linear(rows, weight, bias).view(shape), u
    with torch.cuda.device_of(x):
        decodes = offsets is None and index.numel() == rows.shape[0] <= decode.MAX_EXAMPLES
        if decodes:
            y = decode.decode(rows, weight, bias, lora_a, lora_b, index, scale, ranks, config)
            u = shrink(rows, lora_a, index, scale, ranks, offsets, config) if keep else None
        else:
            y, u = product(
                rows, weight, bias, lora_a, lora_b, index, scale, ranks, offsets, "forward", keep,
                config,
            )  # fmt: skip
    return y.view(shape), u if keep else rows.new_empty(0, lora_a.shape[1])


def lora_linear_backward(
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
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.lora_linear_backward``; config as above, and for reduce."""
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    index, ranks, offsets = (_contiguous(t) for t in (adapter_index, ranks, offsets))
    if rows.numel() == 0 or lora_a.numel() == 0:
        d_factors = (torch.zeros_like(f, memory_format=torch.contiguous_format)
                     for f in (lora_a, lora_b))  # fmt: skip
        return (grads @ weight).view(x.shape), *d_factors
    with torch.cuda.device_of(x):
        d_x, d_u = product(
            grads, weight.mT, None, lora_b, lora_a, index, scale, ranks, offsets, "backward", True,
            config,
        )  # fmt: skip
        order, bounds = examples_by_adapter(index, lora_a.shape[0])
        d_a = reduce(d_u, rows, lora_a, order, bounds, ranks, offsets, config)
        d_b = reduce(u.contiguous(), grads, lora_b, order, bounds, ranks, offsets, config)
    return d_x.view(x.shape), d_a, d_b


# --- ahead of time ---------------------------------------------------------------------------

KERNELS = {
    "shrink": _shrink,
    "expand": _expand,
    "reduce": _reduce,
    "epilogue": gemm.gemm,
    "recompute": gemm.gemm,
    "decode_shrink": decode.decode_shrink,
    "decode_linear": decode.decode_linear,
}


def aot_cases() -> list[AotCase]:
    """Every kernel with every configuration, at the widths of the 500M shape.

    Half precision with packed examples, ragged ranks and a bias, float32 without. What multiplies
    by W in training is there twice, for y and for the gradient of x, which reads W transposed.
    """
    table = device.table(OP)
    served = [(SECTIONS[section], entry) for section in SECTIONS for entry in table[section]]
    # sm_90 takes the defaults of what has no entry of its own there.
    served += [
        ("sm_90", entry)
        for entry in table["default"]
        if entry["where"]["kernel"] in GEMMS and entry["where"]["inputs"] == "single"
    ]
    return [
        _aot_case(architecture, entry["where"], entry["config"], direction)
        for architecture, entry in served
        if entry["where"]["kernel"] in KERNELS
        for direction in ("forward", "backward")
        if direction == "forward" or entry["where"]["kernel"] in GEMMS
    ]


def _aot_case(
    architecture: str, where: Mapping[str, int | str], config: Mapping[str, int], direction: str
) -> AotCase:
    kernel, half, rank = where["kernel"], where["inputs"] == "half", where.get("rank", 32)
    function, size = KERNELS[kernel], 2 if half else 4
    forward = direction == "forward"
    tile = {name: value for name, value in config.items() if name.startswith("BLOCK_")}
    tile["BLOCK_R"] = block_of_ranks(tile["BLOCK_R"], rank)
    absent = {
        *(() if half else ("ranks", "offsets")),
        *(() if half and forward else ("bias",)),
        *(("down",) if kernel == "epilogue" else ()),
    }
    constants = {
        **tile,
        **dict.fromkeys(("stride_xd", "stride_fd", "stride_dd", "stride_ud"), 1),
        "stride_wi" if forward else "stride_wo": 1,
        **dict.fromkeys(absent, None),
        "RECOMPUTE": kernel == "recompute",
        "PRECISION": "tf32" if half else "ieee",
    }
    values = dict.fromkeys(
        ("x", "factor", "down", "up", "out", "u", "y", "weight", "bias"),
        "*bf16" if half else "*fp32",
    )
    values |= dict.fromkeys(("index", "ranks", "offsets", "order"), "*i64")
    values |= {"bounds": "*i32", "partial": "*fp32", "scale": "fp32"}
    if kernel == "reduce":
        values["out"] = "*fp32"
    signature = {
        name: values.get(name, "i32") for name in function.arg_names if name not in constants
    }
    lengths = {"tokens", "examples", "adapters", "splits", "span"}
    integers = {name for name, kind in signature.items() if kind == "i32"}
    flops, moved = _work(kernel, size, rank, where, tile)
    blocks = " ".join(f"{name[-1]}{value}" for name, value in tile.items())
    note = f"{blocks} rank {rank} {architecture}{'' if forward else ' backward'}"
    return AotCase(
        name=f"{OP}.{kernel} {'bf16' if half else 'fp32'} {note}",
        function=function,
        signature=signature,
        constexprs={name: v for name, v in constants.items() if name in function.arg_names},
        divisible=frozenset(integers - lengths),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        architecture=architecture,
        expects_mma=half and kernel != "decode_shrink",
        flops=flops,
        bytes=moved,
    )


def _work(
    kernel: str, size: int, rank: int, where: Mapping[str, int | str], tile: Mapping[str, int]
) -> tuple[int, int]:
    """FLOPs and bytes of one program at d_in 2,560; a reduction goes over one example."""
    d_in = 2560
    t, r, n, e = (tile.get(f"BLOCK_{axis}", 0) for axis in "TRNE")
    if kernel == "shrink":
        return 2 * t * r * d_in, size * (t * d_in + r * d_in + t * r)
    if kernel == "expand":
        return 2 * t * n * rank, size * (2 * t * n + rank * (t + n))
    if kernel in GEMMS:
        again = 2 * t * r * d_in if kernel == "recompute" else 0
        moved = (t + n) * d_in + t * n + rank * (t + n) + (r * d_in if again else 0)
        return 2 * t * n * (d_in + rank) + again, size * moved
    if kernel == "reduce":
        tokens = where["tokens"]
        return 2 * tokens * r * n, size * tokens * (r + n) + 4 * r * n
    if kernel == "decode_shrink":
        return 2 * r * d_in, size * (r + 1) * d_in + 4 * r
    return 2 * e * n * (d_in + rank), size * (n * d_in + e * (d_in + rank * n + n)) + 4 * e * rank
