"""A GEMM over W that adds a LoRA adapter before it stores: forms epilogue and recompute.

A program holds a [BLOCK_T, BLOCK_N] tile of y = x Wᵀ (+ bias) + u B_i. With ``epilogue`` u was
shrunk before and its product with B is one more step of the GEMM; with ``recompute`` the loop over
the depth collects u = scale · x A_iᵀ next to y, in every column tile again, and the first column's
programs write it where it is wanted. Programs of one row tile run next to each other: x comes from
DRAM once, W stays in the second-level cache.

The gradient of x is the same product with W transposed and A and B swapped.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.lora_linear.tiles import (
    Config,
    block_of_ranks,
    chosen,
    per_example,
    precision,
    rows_of_tile,
    token_tiles,
    used_rank,
)


@triton.jit(do_not_specialize=["tokens", "examples", "adapters"])
def gemm(
    x, weight, bias, down, up, u, out, index, ranks, offsets, scale,
    tokens, examples, adapters, depth, width, rank,
    stride_xt, stride_xd, stride_wo, stride_wi,
    stride_dn, stride_dr, stride_dd, stride_un, stride_ur, stride_ud,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    RECOMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[t, n] = sum_k x[t, k] W[n, k] (+ bias[n]) + sum_r u[t, r] up[adapter of t, r, n].

    RECOMPUTE: u[t, r] = scale * sum_k x[t, k] down[adapter of t, r, k], in one block of ranks; it
    is written when ``u`` is given. Else ``u`` is read and ``down`` is None.
    """
    columns_of_tiles = tl.cdiv(width, BLOCK_N)
    column = tl.program_id(0) % columns_of_tiles
    tile = tl.program_id(0) // columns_of_tiles
    example, first, end = rows_of_tile(tile, offsets, tokens, examples, BLOCK_T)
    if first >= end:
        return
    adapter = tl.load(index + example).to(tl.int64)
    used = used_rank(adapter, ranks, rank, adapters)
    rows = first + tl.arange(0, BLOCK_T)
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    slots = tl.arange(0, BLOCK_R)
    inside = columns < width
    x_rows = x + rows[:, None] * stride_xt
    w_rows = weight + columns[None, :] * stride_wo
    total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    shrunk = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_tile = tl.load(
            x_rows + k[None, :] * stride_xd,
            mask=(rows < end)[:, None] & (k < depth)[None, :],
            other=0.0,
        )
        w_tile = tl.load(
            w_rows + k[:, None] * stride_wi,
            mask=inside[None, :] & (k < depth)[:, None],
            other=0.0,
        )
        total = tl.dot(x_tile, w_tile, total, input_precision=PRECISION)
        if RECOMPUTE:
            d_tile = tl.load(
                down + adapter * stride_dn + slots[None, :] * stride_dr + k[:, None] * stride_dd,
                mask=(slots < used)[None, :] & (k < depth)[:, None],
                other=0.0,
            )
            shrunk = tl.dot(x_tile, d_tile.to(x_tile.dtype), shrunk, input_precision=PRECISION)
    u_rows = rows[:, None] * rank
    up_columns = up + adapter * stride_un + columns[None, :] * stride_ud
    if RECOMPUTE:
        # An infinite x times a masked zero is NaN, so unused slots are cleared.
        u_tile = tl.where((slots < used)[None, :], shrunk * scale, 0.0).to(x.dtype.element_ty)
        if u is not None:
            if column == 0:
                tl.store(
                    u + u_rows + slots[None, :],
                    u_tile,
                    mask=(rows < end)[:, None] & (slots < rank)[None, :],
                )
        up_tile = tl.load(
            up_columns + slots[:, None] * stride_ur,
            mask=(slots < used)[:, None] & inside[None, :],
            other=0.0,
        )
        total = tl.dot(u_tile, up_tile.to(u_tile.dtype), total, input_precision=PRECISION)
    else:
        for start in range(0, used, BLOCK_R):
            r = start + slots
            u_tile = tl.load(
                u + u_rows + r[None, :],
                mask=(rows < end)[:, None] & (r < used)[None, :],
                other=0.0,
            )
            up_tile = tl.load(
                up_columns + r[:, None] * stride_ur,
                mask=(r < used)[:, None] & inside[None, :],
                other=0.0,
            )
            total = tl.dot(u_tile, up_tile.to(u_tile.dtype), total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + rows[:, None] * width + columns[None, :],
        total.to(out.dtype.element_ty),
        mask=(rows < end)[:, None] & inside[None, :],
    )


def epilogue(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    up: Tensor,
    u: Tensor,
    adapter_index: Tensor,
    ranks: Tensor | None,
    offsets: Tensor | None,
    config: Config | None = None,
) -> Tensor:
    """x Wᵀ (+ bias) + u up_i for rows x [T, d], W [N, d], up [n, r, N], contiguous u [T, r]."""
    tile = chosen("epilogue", x, config, **_shape(x, up, adapter_index, offsets))
    tile["BLOCK_R"] = block_of_ranks(tile["BLOCK_R"], up.shape[1])
    return _launch(x, weight, bias, None, up, u, adapter_index, 1.0, ranks, offsets, tile)


def recompute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    adapter_index: Tensor,
    scale: float,
    ranks: Tensor | None,
    offsets: Tensor | None,
    keep: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None] | None:
    """(x Wᵀ (+ bias) + u up_i, u) with u = scale · x down_iᵀ [T, r], None unless ``keep``.

    None alone when the rank is larger than a tile holds.
    """
    rank = up.shape[1]
    tile = chosen("recompute", x, config, **_shape(x, up, adapter_index, offsets))
    if rank > tile["BLOCK_R"]:
        return None
    tile["BLOCK_R"] = block_of_ranks(tile["BLOCK_R"], rank)
    u = torch.empty(x.shape[0], rank, dtype=x.dtype, device=x.device) if keep else None
    return _launch(x, weight, bias, down, up, u, adapter_index, scale, ranks, offsets, tile), u


def _shape(x: Tensor, up: Tensor, adapter_index: Tensor, offsets: Tensor | None) -> dict[str, int]:
    return {"tokens": per_example(x, adapter_index, offsets), "rank": up.shape[1]}


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor,
    u: Tensor | None,
    adapter_index: Tensor,
    scale: float,
    ranks: Tensor | None,
    offsets: Tensor | None,
    tile: dict[str, int],
) -> Tensor:
    (adapters, rank, width), examples = up.shape, adapter_index.numel()
    tokens = per_example(x, adapter_index, offsets)
    out = torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device)
    tiles = token_tiles(x.shape[0], examples, tokens, offsets is not None, tile["BLOCK_T"])
    gemm[(tiles * triton.cdiv(width, tile["BLOCK_N"]),)](
        x, weight, bias, down, up, u, out, adapter_index, ranks, offsets, scale,
        tokens, examples, adapters, x.shape[1], width, rank,
        *x.stride(), *weight.stride(), *((0, 0, 0) if down is None else down.stride()),
        *up.stride(), RECOMPUTE=down is not None, PRECISION=precision(x), **tile,
    )  # fmt: skip
    return out
