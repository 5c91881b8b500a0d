"""Triton kernel of rank_projection: head GEMM with norm, scalers and split in one pass.

Roofline, at the 500M shape (Z 512, W 3,520), bf16, H200 (790 TFLOP/s, 4.3 TB/s measured) and A100
(312, 2.0): the layer's head is 3.6 MB, 0.84 and 1.8 us; M = N·R rows add 2·M·Z·W FLOPs, for 16 rows
0.07 and 0.18 us, and M·W of output. Memory bound up to M of about 180. A program takes all rows it
can with one tile of the head, and programs of the same tile run next to each other: the head is
read from DRAM once. In plain torch norm, scaling, split and casts move the output about 8 more
times.

Tiling: columns of A and of B have tiles of their own, so none straddles the boundary and a program
writes one output. The row norm commutes with the GEMM and is applied to the accumulator, from the
sum of squares of the tiles it multiplies anyway. Every tensor is read by its own strides.

The backward pass is that of ``reference.py``: matrix products, which are cuBLAS's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton import device
from csrc_triton.aot import SECTIONS, AotCase
from csrc_triton.rank_projection.reference import rank_projection_backward

OP = "rank_projection"
__all__ = ["aot_cases", "rank_projection", "rank_projection_backward"]


@triton.jit(do_not_specialize=["rows"])
def _project(
    latents, weight, scaler_a, scaler_b, out_a, out_b,
    rows, rank, depth, d_in, d_out,
    stride_xn, stride_xr, stride_xz, stride_wz, stride_wd, stride_sa, stride_sb,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (row tile, column tile)."""
    tiles_a = tl.cdiv(d_in, BLOCK_N)
    of_b = tl.program_id(1) >= tiles_a
    width = tl.where(of_b, d_out, d_in)
    n = (tl.program_id(1) - tl.where(of_b, tiles_a, 0)) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = m % rank
    x_rows = latents + (m // rank).to(tl.int64) * stride_xn + r * stride_xr
    w_columns = weight + (n + tl.where(of_b, d_in, 0)) * stride_wd
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_tile = tl.load(
            x_rows[:, None] + k[None, :] * stride_xz,
            mask=(m < rows)[:, None] & (k < depth)[None, :],
            other=0.0,
        )
        w_tile = tl.load(
            w_columns[None, :] + k[:, None] * stride_wz,
            mask=(k < depth)[:, None] & (n < width)[None, :],
            other=0.0,
        )
        wide = x_tile.to(tl.float32)
        squares += wide * wide
        if x_tile.dtype == w_tile.dtype:
            total = tl.dot(x_tile, w_tile, total, input_precision=PRECISION)
        else:
            total = tl.dot(wide, w_tile.to(tl.float32), total, input_precision="ieee")
    norm = tl.sqrt(tl.sum(squares, axis=1))
    inverse = tl.where(norm > 0, 1.0 / tl.where(norm > 0, norm, 1.0), 0.0)
    inside = (m < rows)[:, None] & (n < width)[None, :]
    target = m.to(tl.int64)[:, None] * width + n[None, :]
    if of_b:
        scaler = tl.load(scaler_b + r * stride_sb, mask=m < rows, other=0.0)
        total *= (inverse * scaler.to(tl.float32))[:, None]
        tl.store(out_b + target, total.to(out_b.dtype.element_ty), mask=inside)
    else:
        scaler = tl.load(scaler_a + r * stride_sa, mask=m < rows, other=0.0)
        total *= (inverse * scaler.to(tl.float32))[:, None]
        tl.store(out_a + target, total.to(out_a.dtype.element_ty), mask=inside)


def rank_projection(
    latents: Tensor,
    weight: Tensor,
    scaler_a: Tensor,
    scaler_b: Tensor,
    d_in: int,
    d_out: int,
    config: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``reference.rank_projection``.

    Args:
        config: tile sizes instead of those of configs.json.
    """
    count, rank, depth = latents.shape
    rows = count * rank
    out_a, out_b = (latents.new_empty(count, rank, d) for d in (d_in, d_out))
    if config is None:
        inputs = "single" if torch.float32 in (latents.dtype, weight.dtype) else "half"
        config = device.lookup(OP, device.capability(latents.device), inputs=inputs, rows=rows)
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    grid = triton.cdiv(rows, block_m), triton.cdiv(d_in, block_n) + triton.cdiv(d_out, block_n)
    if 0 in grid:
        return out_a, out_b
    with torch.cuda.device_of(latents):
        _project[grid](
            latents, weight, scaler_a, scaler_b, out_a, out_b,
            rows, rank, depth, d_in, d_out,
            *latents.stride(), *weight.stride(), *scaler_a.stride(), *scaler_b.stride(),
            PRECISION="ieee" if latents.dtype == torch.float32 else "tf32", **config,
        )  # fmt: skip
    return out_a, out_b


def aot_cases() -> list[AotCase]:
    """The kernel with every configuration at the 500M shape."""
    return [
        aot_case(architecture, entry["where"], entry["config"])
        for section, architecture in SECTIONS.items()
        for entry in device.table(OP)[section]
    ]


def aot_case(
    architecture: str, where: Mapping[str, int | str], config: Mapping[str, int]
) -> AotCase:
    """A kernel with a configuration, at the shape that it is chosen for."""
    half, depth = where["inputs"] == "half", 512
    size, tensor = (2, "*bf16") if half else (4, "*fp32")
    tile = {name: value for name, value in config.items() if name.startswith("BLOCK_")}
    constants = {
        **tile,
        **dict.fromkeys(("stride_xz", "stride_wd", "stride_sa", "stride_sb"), 1),
        "PRECISION": "tf32" if half else "ieee",
    }
    tensors = {"latents", "weight", "scaler_a", "scaler_b", "out_a", "out_b"}
    signature = {
        name: tensor if name in tensors else "i32"
        for name in _project.arg_names
        if name not in constants
    }
    m, n = tile["BLOCK_M"], tile["BLOCK_N"]
    blocks = " ".join(f"{name[-1]}{value}" for name, value in tile.items())
    return AotCase(
        name=f"{OP} {tensor[1:]} {blocks} {architecture}",
        function=_project,
        signature=signature,
        constexprs=constants,
        divisible=frozenset(k for k, kind in signature.items() if kind == "i32") - {"rows"},
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        architecture=architecture,
        expects_mma=half,
        flops=2 * m * n * depth,
        bytes=size * (m * depth + depth * n + m * n),
        iterations=depth // tile["BLOCK_K"],
    )
