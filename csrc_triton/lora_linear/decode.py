"""Triton kernels of lora_linear for decoding, one token an example: two launches of a fixed grid.

Roofline, 500M shape (d_in 2,560, d_out 960), bf16, H200 (4.3 TB/s measured) and A100 (2.0):

- bytes: W is 4.9 MB, an adapter of rank r 7 r KB; 64 adapters of rank 32 are 14.4 MB.
- FLOPs: 4.9 M a token for W and 7 r K for its adapter, at most 64 FLOP/B: bound by memory.
- floor: 1.2 and 2.5 us for W, 3.4 and 7.2 us for 64 adapters of rank 32.

A split-K GEMV over A comes first, then a skinny GEMM over W whose epilogue adds u B. One kernel for
both would read A again in every column tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.lora_linear.tiles import Config, block_of_ranks, precision, tile_of, used_rank

# The largest tile of examples; with more, W would be read more than once.
MAX_EXAMPLES = 64


@triton.jit(do_not_specialize=["examples", "adapters", "span"])
def decode_shrink(
    x, factor, partial, index, ranks,
    examples, adapters, span, width, rank,
    stride_xt, stride_xd, stride_fn, stride_fr, stride_fd,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[split, e, r] = sum_k x[e, k] factor[adapter of e, r, k] over a split's span of k."""
    example = tl.program_id(0)
    split = tl.program_id(2)
    adapter = tl.load(index + example).to(tl.int64)
    used = used_rank(adapter, ranks, rank, adapters)
    slots = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    f_rows = factor + adapter * stride_fn + slots[:, None] * stride_fr
    x_row = x + example.to(tl.int64) * stride_xt
    products = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    first = split * span
    last = tl.where(tl.program_id(1) * BLOCK_R < used, tl.minimum(first + span, width), first)
    for start in range(first, last, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_tile = tl.load(x_row + k * stride_xd, mask=k < last, other=0.0)
        f_tile = tl.load(
            f_rows + k[None, :] * stride_fd,
            mask=(slots < used)[:, None] & (k < last)[None, :],
            other=0.0,
        )
        products += f_tile.to(x_tile.dtype).to(tl.float32) * x_tile.to(tl.float32)[None, :]
    shrunk = tl.where(slots < used, tl.sum(products, axis=1), 0.0)
    row = split.to(tl.int64) * examples + example
    tl.store(partial + row * rank + slots, shrunk, mask=slots < rank)


@triton.jit(do_not_specialize=["examples", "adapters", "splits"])
def decode_linear(
    x, weight, bias, factor, partial, out, index, ranks, scale,
    examples, adapters, splits, d_in, d_out, rank,
    stride_xt, stride_xd, stride_wo, stride_wi, stride_fn, stride_fr, stride_fd,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out[e, n] = x[e] W[n] (+ bias[n]) + scale * sum_r (sum_split partial[e, r]) factor[., r, n].

    The epilogue handles all examples of a tile at once and masks ragged ranks: a loop over examples
    would wait for memory once per example.
    """
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows = x + e.to(tl.int64)[:, None] * stride_xt
    w_rows = weight + columns.to(tl.int64)[None, :] * stride_wo
    total = tl.zeros((BLOCK_E, BLOCK_N), dtype=tl.float32)
    for start in range(0, d_in, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_tile = tl.load(
            x_rows + k[None, :] * stride_xd,
            mask=(e < examples)[:, None] & (k < d_in)[None, :],
            other=0.0,
        )
        w_tile = tl.load(
            w_rows + k[:, None] * stride_wi,
            mask=(columns < d_out)[None, :] & (k < d_in)[:, None],
            other=0.0,
        )
        total = tl.dot(x_tile, w_tile, total, input_precision=PRECISION)
    adapter = tl.load(index + e, mask=e < examples, other=-1).to(tl.int64)
    used = used_rank(adapter, ranks, rank, adapters)
    f_rows = factor + adapter[:, None, None] * stride_fn + columns[None, None, :] * stride_fd
    delta = tl.zeros((BLOCK_E, BLOCK_N), dtype=tl.float32)
    for start in range(0, tl.max(used, axis=0), BLOCK_R):
        slots = start + tl.arange(0, BLOCK_R)
        live = slots[None, :] < used[:, None]
        u = tl.zeros((BLOCK_E, BLOCK_R), dtype=tl.float32)
        for split in range(0, splits):
            row = (split * examples + e).to(tl.int64) * rank
            u += tl.load(partial + row[:, None] + slots[None, :], mask=live, other=0.0)
        f_tile = tl.load(
            f_rows + slots[None, :, None] * stride_fr,
            mask=live[:, :, None] & (columns < d_out)[None, None, :],
            other=0.0,
        )
        f_tile = f_tile.to(x.dtype.element_ty).to(tl.float32)
        delta += tl.sum(u[:, :, None] * f_tile, axis=1)
    total += scale * delta
    if bias is not None:
        total += tl.load(bias + columns, mask=columns < d_out, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + e.to(tl.int64)[:, None] * d_out + columns[None, :],
        total.to(out.dtype.element_ty),
        mask=(e < examples)[:, None] & (columns < d_out)[None, :],
    )


def decode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_index: Tensor,
    scale: float,
    ranks: Tensor | None,
    config: Config | None,
) -> Tensor:
    """y [E, d_out] for one token an example, x [E, d_in]; u is not kept."""
    (examples, d_in), (adapters, rank, _), d_out = x.shape, lora_a.shape, weight.shape[0]
    tile = tile_of("decode_shrink", x, config, examples=examples, rank=rank)
    tile["BLOCK_R"] = block_of_ranks(tile["BLOCK_R"], rank)
    programs = tile.pop("programs")
    grid = (examples, triton.cdiv(rank, tile["BLOCK_R"]))
    blocks = triton.cdiv(d_in, tile["BLOCK_K"])
    per_split = triton.cdiv(blocks, min(blocks, triton.cdiv(programs, grid[0] * grid[1])))
    splits = triton.cdiv(blocks, per_split)
    partial = torch.empty(splits, examples, rank, dtype=torch.float32, device=x.device)
    decode_shrink[(*grid, splits)](
        x, lora_a, partial, adapter_index, ranks,
        examples, adapters, per_split * tile["BLOCK_K"], d_in, rank,
        *x.stride(), *lora_a.stride(), **tile,
    )  # fmt: skip
    tile = tile_of("decode_linear", x, config, examples=examples, d_out=d_out)
    out = torch.empty(examples, d_out, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(d_out, tile["BLOCK_N"]), triton.cdiv(examples, tile["BLOCK_E"]))
    decode_linear[grid](
        x, weight, bias, lora_b, partial, out, adapter_index, ranks, scale,
        examples, adapters, splits, d_in, d_out, rank,
        *x.stride(), *weight.stride(), *lora_b.stride(), PRECISION=precision(x), **tile,
    )  # fmt: skip
    return out
