"""Triton kernels of lora_linear: training and prefill, forward and backward, and decoding.

Roofline, 500M shape (d_in 2,560, d_out 960), bf16, rank r, H200 (790 TFLOP/s, 4.3 TB/s measured)
and A100 (312, 2.0), per token:

- the GEMM over W is cuBLAS's: 4.9 MFLOP, floor 6.2 and 15.8 ns. The adapter adds r/700 of the FLOPs
  and is bound by memory.
- shrink reads x: 5.1 KB, 1.2 and 2.6 ns. It writes u = scale · x A_iᵀ, 2 r bytes a token, kept for
  the gradient of B, which would otherwise read x once more.
- expand reads and writes y: 3.8 KB, 0.9 and 1.9 ns; 2.4 and 5.1 ns for the gradient of x, which is
  the same computation with A and B swapped.
- the gradients of A and B are two reductions that read x and dy once each: 7.0 KB, 1.6 and 3.5 ns.

A GEMM of ours that adds the adapter before it stores would save the second pass over y, and pays
above 87% of cuBLAS's rate forward and 72% backward at 4.3 TB/s, which a Triton GEMM rarely reaches:
W stays with cuBLAS.

Reductions have a fixed order and no atomics. The A operand of every pipelined tl.dot comes from
memory, never from registers that were computed on: ptxas before 13.3 miscompiles pipelined wgmma
with such an operand (triton#9433).

Decoding, one token an example, is bound by memory: W is 4.9 MB, an adapter of rank r 7 r KB, 64
adapters of rank 32 are 14.4 MB; floor 1.2 and 2.5 us for W, 3.4 and 7.2 us for those adapters. The
product with W is cuBLAS's, so a decoded token has the bits of a prefilled one up to the adapter's
share; a split-K GEMV over A and a kernel that sums its splits and adds u B to y follow. From sm_90
on, the second is launched while the first runs (programmatic dependent launch). A skinny
GEMM of ours with that sum in its epilogue is one chain of 160 dependent products a program:
predicted 13 us at 16 examples and 27 us at 64 on an H100, against 8 us for the three launches.

x and the gradients are viewed as rows, copied only where their strides do not allow a view; W and
the adapters are read with their own strides.
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

OP = "lora_linear"

# Tile sizes by the name of the kernel.
Config = Mapping[str, Mapping[str, int]]

# --- kernels ---------------------------------------------------------------------------------


@triton.jit
def _used_rank(adapter, ranks, rank, adapters):
    """Number of rank slots in use; 0 for no adapter. An index out of range reads nothing."""
    exists = (adapter >= 0) & (adapter < adapters)
    if ranks is None:
        used = rank
    else:
        used = tl.minimum(tl.load(ranks + adapter, mask=exists, other=0).to(tl.int32), rank)
    return tl.where(exists, used, 0)


@triton.jit
def _rows_of_tile(tile, tokens, BLOCK_T: tl.constexpr):
    """(example, first row, row after the example's last); a tile belongs to one example."""
    per_example = tl.cdiv(tokens, BLOCK_T)
    example = tile // per_example
    begin = example.to(tl.int64) * tokens
    return example, begin + (tile - example * per_example) * BLOCK_T, begin + tokens


@triton.jit(do_not_specialize=["tokens", "adapters"])
def _shrink(
    x, factor, out, index, ranks, scale,
    tokens, adapters, width, rank,
    stride_xt, stride_xd, stride_fn, stride_fr, stride_fd,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[t, r] = scale * sum_k x[t, k] factor[adapter of t, r, k]; zero in unused slots."""
    example, first, end = _rows_of_tile(tl.program_id(0), tokens, BLOCK_T)
    adapter = tl.load(index + example).to(tl.int64)
    used = _used_rank(adapter, ranks, rank, adapters)
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


@triton.jit(do_not_specialize=["tokens", "adapters"])
def _expand(
    y, u, factor, index, ranks,
    tokens, adapters, width, rank,
    stride_fn, stride_fr, stride_fd,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[t, n] += sum_r u[t, r] factor[adapter of t, r, n]; leaves rows without adapter alone."""
    example, first, end = _rows_of_tile(tl.program_id(0), tokens, BLOCK_T)
    adapter = tl.load(index + example).to(tl.int64)
    used = _used_rank(adapter, ranks, rank, adapters)
    if used <= 0:
        return
    rows = first + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    u_rows = u + rows[:, None] * rank
    f_columns = factor + adapter * stride_fn + columns[None, :] * stride_fd
    delta = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for start in range(0, used, BLOCK_R):
        slots = start + tl.arange(0, BLOCK_R)
        # u is 0 in unused slots; a mask by the rank, which is a multiple of 16, keeps wide loads.
        u_tile = tl.load(
            u_rows + slots[None, :],
            mask=(rows < end)[:, None] & (slots < rank)[None, :],
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
    u, x, out, order, bounds, ranks,
    tokens, adapters, splits, width, rank,
    stride_xt, stride_xd,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[split, i, r, n] = sum of u[t, r] x[t, n] over each splits-th block of i's tokens.

    order: examples sorted by adapter; those of adapter i are order[bounds[i] : bounds[i + 1]].
    """
    tiles = tl.cdiv(rank, BLOCK_R)
    adapter = tl.program_id(0) // tiles
    split = tl.program_id(2)
    slots = (tl.program_id(0) % tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    used = _used_rank(adapter, ranks, rank, adapters)
    total = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    blocks_before = 0
    for position in range(tl.load(bounds + adapter), tl.load(bounds + adapter + 1)):
        example = tl.load(order + position)
        begin = example.to(tl.int64) * tokens
        end = begin + tokens
        blocks = tl.cdiv(tokens, BLOCK_T)
        own = (split + splits - blocks_before % splits) % splits
        for block in range(own, blocks, splits):
            rows = begin + block * BLOCK_T + tl.arange(0, BLOCK_T)
            u_tile = tl.load(
                u + rows[None, :] * rank + slots[:, None],
                mask=(rows < end)[None, :] & (slots < rank)[:, None],
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


@triton.jit(do_not_specialize=["examples", "adapters", "blocks"])
def _decode_shrink(
    x, factor, partial, index, ranks,
    examples, adapters, blocks, width, rank,
    stride_xt, stride_xd, stride_fn, stride_fr, stride_fd,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """partial[split, e, r] = sum of x[e, k] factor[adapter of e, r, k] over a split's blocks.

    With PDL, the next kernel may start as soon as every program of this one runs.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    example = tl.program_id(0)
    split = tl.program_id(2)
    adapter = tl.load(index + example).to(tl.int64)
    used = _used_rank(adapter, ranks, rank, adapters)
    slots = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    f_rows = factor + adapter * stride_fn + slots[:, None] * stride_fr
    x_row = x + example.to(tl.int64) * stride_xt
    products = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    first = split * blocks * BLOCK_K
    span = tl.where(tl.program_id(1) * BLOCK_R < used, blocks * BLOCK_K, 0)
    for done in range(0, span, BLOCK_K):
        # The mask compares with the width alone, a multiple of 16, which keeps wide loads.
        k = first + done + tl.arange(0, BLOCK_K)
        x_tile = tl.load(x_row + k * stride_xd, mask=k < width, other=0.0)
        f_tile = tl.load(
            f_rows + k[None, :] * stride_fd,
            mask=(slots < used)[:, None] & (k < width)[None, :],
            other=0.0,
        )
        products += f_tile.to(x_tile.dtype).to(tl.float32) * x_tile.to(tl.float32)[None, :]
    shrunk = tl.where(slots < used, tl.sum(products, axis=1), 0.0)
    row = split.to(tl.int64) * examples + example
    tl.store(partial + row * rank + slots, shrunk, mask=slots < rank)


@triton.jit(do_not_specialize=["examples", "adapters", "splits"])
def _decode_expand(
    y, factor, partial, index, ranks, scale,
    examples, adapters, splits, d_out, rank,
    stride_fn, stride_fr, stride_fd,
    SPLITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[e, n] += scale * sum_r (sum_split partial[split, e, r]) factor[adapter of e, r, n].

    SPLITS is ``splits`` or the next power of two: the splits are one load, and no load waits for
    another. Rows without adapter stay as they are.

    With PDL, it is launched while the kernel that computes ``partial`` runs.
    """
    example = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    adapter = tl.load(index + example).to(tl.int64)
    used = _used_rank(adapter, ranks, rank, adapters)
    if PDL:
        # What is read above is older than the kernel before. A program that returns waits, too:
        # the end of this kernel means the end of that one to the kernel after.
        tl.extra.cuda.gdc_wait()
    if used <= 0:
        return
    out = y + example.to(tl.int64) * d_out + columns
    base = tl.load(out, mask=columns < d_out, other=0.0).to(tl.float32)
    f_columns = factor + adapter * stride_fn + columns[None, :] * stride_fd
    split = tl.arange(0, SPLITS)
    p_rows = partial + (split * examples + example).to(tl.int64)[:, None] * rank
    delta = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, used, BLOCK_R):
        slots = start + tl.arange(0, BLOCK_R)
        parts = tl.load(
            p_rows + slots[None, :],
            mask=(split < splits)[:, None] & (slots < rank)[None, :],
            other=0.0,
        )
        f_tile = tl.load(
            f_columns + slots[:, None] * stride_fr,
            mask=(slots < used)[:, None] & (columns < d_out)[None, :],
            other=0.0,
        )
        u = tl.sum(parts, axis=0)
        delta += tl.sum(u[:, None] * f_tile.to(y.dtype.element_ty).to(tl.float32), axis=0)
    tl.store(out, (base + scale * delta).to(y.dtype.element_ty), mask=columns < d_out)


# --- launches --------------------------------------------------------------------------------


def tile_of(kernel: str, x: Tensor, config: Config | None, **shape: int) -> dict[str, int]:
    """The tile of a kernel: from ``config`` if that names the kernel, else the tuned one."""
    if config is not None and kernel in config:
        return dict(config[kernel])
    inputs = "single" if x.dtype == torch.float32 else "half"
    gpu = device.capability(x.device)
    return device.lookup(OP, gpu, kernel=kernel, inputs=inputs, **shape)


def block_of_ranks(largest: int, rank: int) -> int:
    """BLOCK_R cut to the rank, but at least the 16 that ``tl.dot`` needs."""
    return min(largest, max(16, triton.next_power_of_2(rank)))


def precision(x: Tensor) -> str:
    """Precision of ``tl.dot``; it matters to float32 only."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def shrink(
    x: Tensor,
    factor: Tensor,
    adapter_index: Tensor,
    scale: float,
    ranks: Tensor | None,
    config: Config | None = None,
) -> Tensor:
    """u [rows, r] of x's dtype: scale · x factor_iᵀ for x [rows, d], factor [n, r, d].

    Slots an adapter does not use, and rows of examples without an adapter, are zero.
    """
    (adapters, rank, width), examples = factor.shape, adapter_index.numel()
    tokens = x.shape[0] // examples
    tile = tile_of("shrink", x, config, tokens=tokens, rank=rank)
    tile["BLOCK_R"] = block_of_ranks(tile["BLOCK_R"], rank)
    out = torch.empty(x.shape[0], rank, dtype=x.dtype, device=x.device)
    grid = (examples * triton.cdiv(tokens, tile["BLOCK_T"]), triton.cdiv(rank, tile["BLOCK_R"]))
    _shrink[grid](
        x, factor, out, adapter_index, ranks, scale,
        tokens, adapters, width, rank,
        *x.stride(), *factor.stride(), PRECISION=precision(x), **tile,
    )  # fmt: skip
    return out


def expand_(
    y: Tensor,
    u: Tensor,
    factor: Tensor,
    adapter_index: Tensor,
    ranks: Tensor | None,
    config: Config | None = None,
) -> None:
    """y [rows, d] += u factor_i in place, for u [rows, r], factor [n, r, d]; y, u contiguous."""
    (adapters, rank, width), examples = factor.shape, adapter_index.numel()
    tokens = y.shape[0] // examples
    tile = tile_of("expand", y, config, tokens=tokens, rank=rank)
    tile["BLOCK_R"] = block_of_ranks(tile["BLOCK_R"], rank)
    grid = (examples * triton.cdiv(tokens, tile["BLOCK_T"]), triton.cdiv(width, tile["BLOCK_N"]))
    _expand[grid](
        y, u, factor, adapter_index, ranks,
        tokens, adapters, width, rank,
        *factor.stride(), PRECISION=precision(u), **tile,
    )  # fmt: skip


def examples_by_adapter(adapter_index: Tensor, adapters: int) -> tuple[Tensor, Tensor]:
    """(order [E], bounds [n + 1]): those of adapter i are order[bounds[i] : bounds[i + 1]]."""
    by_adapter, order = torch.sort(adapter_index, stable=True)
    adapter_ids = torch.arange(adapters + 1, device=order.device, dtype=by_adapter.dtype)
    return order, torch.searchsorted(by_adapter, adapter_ids, out_int32=True)


def reduce(
    u: Tensor,
    x: Tensor,
    factor: Tensor,
    order: Tensor,
    bounds: Tensor,
    ranks: Tensor | None,
    config: Config | None = None,
) -> Tensor:
    """Gradient of ``factor`` [n, r, d], of its dtype: Σ u[t]ᵀ x[t] over each adapter's tokens.

    u [rows, r] contiguous, x [rows, d]. Few adapters leave most of a GPU idle, so the tokens are
    split, and the parts added in order.
    """
    adapters, rank, width = factor.shape
    tokens = x.shape[0] // order.numel()
    tile = tile_of("reduce", x, config, tokens=tokens, rank=rank)
    tile["BLOCK_R"] = block_of_ranks(tile["BLOCK_R"], rank)
    columns, programs = triton.cdiv(width, tile["BLOCK_N"]), tile.pop("programs")
    grid = (adapters * triton.cdiv(rank, tile["BLOCK_R"]), columns)
    splits = min(triton.cdiv(programs, grid[0] * grid[1]), triton.cdiv(x.shape[0], tile["BLOCK_T"]))
    parts = torch.empty(
        splits, *factor.shape, device=x.device,
        dtype=factor.dtype if splits == 1 else torch.float32,
    )  # fmt: skip
    _reduce[(*grid, splits)](
        u, x, parts, order, bounds, ranks,
        tokens, adapters, splits, width, rank,
        *x.stride(), PRECISION=precision(x), **tile,
    )  # fmt: skip
    return parts[0] if splits == 1 else parts.sum(0).to(factor.dtype)


def decode_shrink(
    x: Tensor,
    factor: Tensor,
    adapter_index: Tensor,
    ranks: Tensor | None,
    config: Config | None = None,
) -> Tensor:
    """Parts [splits, E, r] in float32 whose sum is x factor_iᵀ, for x [E, d], factor [n, r, d].

    Slots an adapter does not use, and rows of examples without an adapter, are zero.
    """
    (examples, width), (adapters, rank, _) = x.shape, factor.shape
    tile = tile_of("decode_shrink", x, config, examples=examples, rank=rank)
    tile["BLOCK_R"] = block_of_ranks(tile["BLOCK_R"], rank)
    programs = tile.pop("programs")
    grid = (examples, triton.cdiv(rank, tile["BLOCK_R"]))
    blocks = triton.cdiv(width, tile["BLOCK_K"])
    per_split = triton.cdiv(blocks, min(blocks, triton.cdiv(programs, grid[0] * grid[1])))
    splits = triton.cdiv(blocks, per_split)
    partial = torch.empty(splits, examples, rank, dtype=torch.float32, device=x.device)
    _decode_shrink[(*grid, splits)](
        x, factor, partial, adapter_index, ranks,
        examples, adapters, per_split, width, rank,
        *x.stride(), *factor.stride(), PDL=device.has_dependent_launch(x.device), **tile,
    )  # fmt: skip
    return partial


def decode_expand_(
    y: Tensor,
    partial: Tensor,
    factor: Tensor,
    adapter_index: Tensor,
    scale: float,
    ranks: Tensor | None,
    config: Config | None = None,
) -> None:
    """y [E, d] += scale · (sum of ``partial``) factor_i in place; y and partial contiguous.

    It must be launched directly after the ``decode_shrink`` that made ``partial``.
    """
    (adapters, rank, width), (splits, examples, _) = factor.shape, partial.shape
    tile = tile_of("decode_expand", y, config, examples=examples, rank=rank)
    tile["BLOCK_R"] = block_of_ranks(tile["BLOCK_R"], rank)
    dependent = device.has_dependent_launch(y.device)
    # Triton's interpreter does not know the option.
    options = {"launch_pdl": True} if dependent else {}
    _decode_expand[(examples, triton.cdiv(width, tile["BLOCK_N"]))](
        y, factor, partial, adapter_index, ranks, scale,
        examples, adapters, splits, width, rank,
        *factor.stride(), SPLITS=triton.next_power_of_2(splits), PDL=dependent, **options, **tile,
    )  # fmt: skip


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_index: Tensor,
    scale: float,
    ranks: Tensor | None,
    keep: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``reference.lora_linear``.

    Examples of one token each whose u is not kept take the decode kernels.

    Args:
        config: tile sizes by kernel (shrink, expand, decode_shrink, decode_expand) instead of those
            of configs.json.
    """
    rows, index = x.reshape(-1, x.shape[-1]), adapter_index.contiguous()
    ranks = None if ranks is None else ranks.contiguous()
    if rows.numel() == 0 or lora_a.numel() == 0:
        u = rows.new_zeros(rows.shape[0] if keep else 0, lora_a.shape[1])
        return F.linear(x, weight, bias), u
    with torch.cuda.device_of(x):
        # A new tensor, so the adapters' share may be added to it in place.
        y = F.linear(rows, weight, bias)
        if index.numel() == rows.shape[0] and not keep:
            partial = decode_shrink(rows, lora_a, index, ranks, config)
            decode_expand_(y, partial, lora_b, index, scale, ranks, config)
            u = rows.new_empty(0, lora_a.shape[1])
        else:
            u = shrink(rows, lora_a, index, scale, ranks, config)
            expand_(y, u, lora_b, index, ranks, config)
    return y.view(*x.shape[:-1], weight.shape[0]), u if keep else u.new_empty(0, u.shape[1])


def lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_index: Tensor,
    scale: float,
    ranks: Tensor | None,
    u: Tensor,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.lora_linear_backward``; config as above, and for reduce."""
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    index, ranks = adapter_index.contiguous(), None if ranks is None else ranks.contiguous()
    if rows.numel() == 0 or lora_a.numel() == 0:
        d_factors = (torch.zeros_like(f, memory_format=torch.contiguous_format)
                     for f in (lora_a, lora_b))  # fmt: skip
        return (grads @ weight).view(x.shape), *d_factors
    with torch.cuda.device_of(x):
        d_u = shrink(grads, lora_b, index, scale, ranks, config)
        d_x = grads @ weight
        expand_(d_x, d_u, lora_a, index, ranks, config)
        order, bounds = examples_by_adapter(index, lora_a.shape[0])
        d_a = reduce(d_u, rows, lora_a, order, bounds, ranks, config)
        d_b = reduce(u.contiguous(), grads, lora_b, order, bounds, ranks, config)
    return d_x.view(x.shape), d_a, d_b


# --- ahead of time ---------------------------------------------------------------------------

KERNELS = {
    "shrink": _shrink,
    "expand": _expand,
    "reduce": _reduce,
    "decode_shrink": _decode_shrink,
    "decode_expand": _decode_expand,
}


def aot_cases() -> list[AotCase]:
    """Every kernel with every configuration, at the widths of the 500M shape.

    Half precision has ragged ranks, float32 does not.
    """
    return [
        aot_case(architecture, entry["where"], entry["config"])
        for section, architecture in SECTIONS.items()
        for entry in device.table(OP)[section]
    ]


def aot_case(
    architecture: str, where: Mapping[str, int | str], config: Mapping[str, int]
) -> AotCase:
    """A kernel with a configuration, at the shape that it is chosen for."""
    kernel, half, rank = where["kernel"], where["inputs"] == "half", where.get("rank", 32)
    function, size = KERNELS[kernel], 2 if half else 4
    tile = {name: value for name, value in config.items() if name.startswith("BLOCK_")}
    tile["BLOCK_R"] = block_of_ranks(tile["BLOCK_R"], rank)
    constants = {
        **tile,
        **dict.fromkeys(("stride_xd", "stride_fd"), 1),
        **dict.fromkeys(() if half else ("ranks",), None),
        "SPLITS": 16,
        "PRECISION": "tf32" if half else "ieee",
        "PDL": architecture == "sm_90",
    }
    values = dict.fromkeys(("x", "factor", "out", "u", "y"), "*bf16" if half else "*fp32")
    values |= dict.fromkeys(("index", "ranks", "order"), "*i64")
    values |= {"bounds": "*i32", "partial": "*fp32", "scale": "fp32"}
    if kernel == "reduce":
        values["out"] = "*fp32"
    signature = {
        name: values.get(name, "i32") for name in function.arg_names if name not in constants
    }
    lengths = {"tokens", "examples", "adapters", "splits", "blocks"}
    integers = {name for name, kind in signature.items() if kind == "i32"}
    flops, moved = _work(kernel, size, rank, where, tile)
    blocks = " ".join(f"{name[-1]}{value}" for name, value in tile.items())
    return AotCase(
        name=f"{OP}.{kernel} {'bf16' if half else 'fp32'} {blocks} rank {rank} {architecture}",
        function=function,
        signature=signature,
        constexprs={name: v for name, v in constants.items() if name in function.arg_names},
        divisible=frozenset(integers - lengths),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        architecture=architecture,
        expects_mma=half and not kernel.startswith("decode"),
        flops=flops,
        bytes=moved,
        iterations=triton.cdiv(*_main_loop(kernel, rank, where, tile)),
    )


def _work(
    kernel: str, size: int, rank: int, where: Mapping[str, int | str], tile: Mapping[str, int]
) -> tuple[int, int]:
    """FLOPs and bytes of one program at d_in 2,560; a reduction covers one example."""
    d_in = 2560
    t, r, n = (tile.get(f"BLOCK_{axis}", 0) for axis in "TRN")
    if kernel == "shrink":
        return 2 * t * r * d_in, size * (t * d_in + r * d_in + t * r)
    if kernel == "expand":
        return 2 * t * n * rank, size * (2 * t * n + rank * (t + n))
    if kernel == "reduce":
        tokens = where["tokens"]
        return 2 * tokens * r * n, size * tokens * (r + n) + 4 * r * n
    if kernel == "decode_shrink":
        return 2 * r * d_in, size * (r + 1) * d_in + 4 * r
    return 2 * n * rank, size * n * (rank + 2) + 4 * 16 * rank


def _main_loop(
    kernel: str, rank: int, where: Mapping[str, int | str], tile: Mapping[str, int]
) -> tuple[int, int]:
    """Length of the axis that a kernel's loop runs over, and of one step."""
    if kernel == "reduce":
        return int(where["tokens"]), tile["BLOCK_T"]
    return (2560, tile["BLOCK_K"]) if kernel.endswith("shrink") else (rank, tile["BLOCK_R"])
