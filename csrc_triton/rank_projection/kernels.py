"""Triton kernel of rank_projection: head GEMM with norm, scalers, split and placement in one pass.

Roofline, per layer at the 500M shape (Z 512, W 3,520), bf16, H200 (790 TFLOP/s, 4.3 TB/s measured)
and A100 (312, 2.0): the head is 3.6 MB, 0.84 and 1.8 us; M = G·C·R rows add 2·M·Z·W FLOPs, for 16
rows 0.07 and 0.18 us, and M·W of output. Memory bound up to M of about 180. A program takes all
rows it can with one tile of the head, and programs of the same tile run next to each other: the
head is read from DRAM once. In plain torch norm, scaling, split, concatenation and casts move the
output about 12 more times.

Tiling: columns of A and of B have tiles of their own, so none straddles the boundary and a program
writes one output. The row norm commutes with the GEMM and is applied to the accumulator, from the
sum of squares of the tiles it multiplies anyway. Bias rows are copied by further programs of the
same launch. Every tensor is read by its own strides.

The backward pass is plain torch, because what is left after the rearrangement below is GEMMs:
with E_s = G_s W_sᵀ for the gradients G_s of side s, one batched GEMM of width Z each,
d scaler_s[r] = Σ unit · E_s, d unit = Σ_s scaler_s E_s and d W_s = (unit · scaler_s)ᵀ G_s. The
forward product is not recomputed and all pointwise work is on [L, M, Z].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton import device
from csrc_triton.aot import SECTIONS, AotCase

OP = "rank_projection"


@triton.jit(do_not_specialize=["groups", "chunks", "layers", "shared"])
def _project(
    latents, weight, scaler_a, scaler_b, bias_a, bias_b, out_a, out_b,
    groups, chunks, layers, rank, shared, depth, d_in, d_out,
    stride_xg, stride_xc, stride_xl, stride_xr, stride_xz,
    stride_wl, stride_wz, stride_wd,
    stride_sal, stride_sar, stride_sbl, stride_sbr,
    stride_bal, stride_bar, stride_bad, stride_bbl, stride_bbr, stride_bbd,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (row tile, column tile, layer): generated rows first, then rows of the bias."""
    layer = tl.program_id(2).to(tl.int64)
    tiles_a = tl.cdiv(d_in, BLOCK_N)
    of_b = tl.program_id(1) >= tiles_a
    width = tl.where(of_b, d_out, d_in)
    n = (tl.program_id(1) - tl.where(of_b, tiles_a, 0)) * BLOCK_N + tl.arange(0, BLOCK_N)
    generated = groups * chunks * rank
    row_tiles = tl.cdiv(generated, BLOCK_M)
    slots = chunks * rank + shared
    if tl.program_id(0) < row_tiles:
        m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        chunk, r = (m // rank) % chunks, m % rank
        group = m // (rank * chunks)
        x_rows = (
            latents
            + layer * stride_xl
            + (group.to(tl.int64) * stride_xg + chunk.to(tl.int64) * stride_xc + r * stride_xr)
        )
        w_columns = weight + layer * stride_wl + (n + tl.where(of_b, d_in, 0)) * stride_wd
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        squares = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        for start in range(0, depth, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            x_tile = tl.load(
                x_rows[:, None] + k[None, :] * stride_xz,
                mask=(m < generated)[:, None] & (k < depth)[None, :],
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
        slot = (group.to(tl.int64) * layers + layer) * slots + chunk * rank + r
        inside = (m < generated)[:, None] & (n < width)[None, :]
        place = slot[:, None] * width + n[None, :]
        if of_b:
            scaler = tl.load(
                scaler_b + layer * stride_sbl + r * stride_sbr, mask=m < generated, other=0.0
            )
            total *= (inverse * scaler.to(tl.float32))[:, None]
            tl.store(out_b + place, total.to(out_b.dtype.element_ty), mask=inside)
        else:
            scaler = tl.load(
                scaler_a + layer * stride_sal + r * stride_sar, mask=m < generated, other=0.0
            )
            total *= (inverse * scaler.to(tl.float32))[:, None]
            tl.store(out_a + place, total.to(out_a.dtype.element_ty), mask=inside)
    elif bias_a is not None:
        m = (tl.program_id(0) - row_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        group, j = m // shared, m % shared
        slot = (group.to(tl.int64) * layers + layer) * slots + chunks * rank + j
        inside = (m < groups * shared)[:, None] & (n < width)[None, :]
        place = slot[:, None] * width + n[None, :]
        if of_b:
            rows = bias_b + layer * stride_bbl + j * stride_bbr
            tile = tl.load(rows[:, None] + n[None, :] * stride_bbd, mask=inside, other=0.0)
            tl.store(out_b + place, tile.to(out_b.dtype.element_ty), mask=inside)
        else:
            rows = bias_a + layer * stride_bal + j * stride_bar
            tile = tl.load(rows[:, None] + n[None, :] * stride_bad, mask=inside, other=0.0)
            tl.store(out_a + place, tile.to(out_a.dtype.element_ty), mask=inside)


def rank_projection(
    latents: Tensor,
    weight: Tensor,
    scaler_a: Tensor,
    scaler_b: Tensor,
    bias_a: Tensor | None,
    bias_b: Tensor | None,
    d_in: int,
    d_out: int,
    config: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``reference.rank_projection``.

    Args:
        config: tile sizes instead of those of configs.json.
    """
    groups, chunks, layers, rank, depth = latents.shape
    shared = 0 if bias_a is None else bias_a.shape[1]
    rows = groups * chunks * rank
    out_a, out_b = (
        latents.new_empty(groups, layers, chunks * rank + shared, d) for d in (d_in, d_out)
    )
    if config is None:
        inputs = "single" if torch.float32 in (latents.dtype, weight.dtype) else "half"
        config = device.lookup(
            OP, device.capability(latents.device), inputs=inputs, rows=rows, layers=layers
        )
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    grid = (
        triton.cdiv(rows, block_m) + triton.cdiv(groups * shared, block_m),
        triton.cdiv(d_in, block_n) + triton.cdiv(d_out, block_n),
        layers,
    )
    if 0 in grid:
        return out_a, out_b
    no_strides = (0, 0, 0)
    with torch.cuda.device_of(latents):
        _project[grid](
            latents, weight, scaler_a, scaler_b, bias_a, bias_b, out_a, out_b,
            groups, chunks, layers, rank, shared, depth, d_in, d_out,
            *latents.stride(), *weight.stride(), *scaler_a.stride(), *scaler_b.stride(),
            *(no_strides if bias_a is None else bias_a.stride()),
            *(no_strides if bias_b is None else bias_b.stride()),
            PRECISION="ieee" if latents.dtype == torch.float32 else "tf32", **config,
        )  # fmt: skip
    return out_a, out_b


def rank_projection_backward(
    grad_a: Tensor,
    grad_b: Tensor,
    latents: Tensor,
    weight: Tensor,
    scaler_a: Tensor,
    scaler_b: Tensor,
    d_in: int,
    d_out: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``reference.rank_projection_backward``, in batched GEMMs.

    They run in the wider dtype of latents and weight; the pointwise part in float32.
    """
    groups, chunks, layers, rank, depth = latents.shape
    generated, compute = chunks * rank, torch.promote_types(latents.dtype, weight.dtype)
    rows = latents.permute(2, 0, 1, 3, 4).reshape(layers, groups * generated, depth).float()
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    inverse = torch.where(norm > 0, 1.0 / norm, torch.zeros_like(norm))
    unit = rows * inverse
    d_unit, d_weight = (
        torch.zeros_like(unit),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
    )
    d_weight[..., d_in + d_out :] = 0
    d_scalers, d_biases = [], []
    for grad, scaler, columns in (
        (grad_a, scaler_a, slice(0, d_in)),
        (grad_b, scaler_b, slice(d_in, d_in + d_out)),
    ):
        wanted = grad[:, :, :generated].transpose(0, 1).to(compute)
        wanted = wanted.reshape(layers, groups * generated, grad.shape[-1])
        scales = scaler.float().repeat(1, groups * chunks)[..., None]
        pulled = torch.bmm(wanted, weight[..., columns].to(compute).mT).float()
        d_unit += scales * pulled
        per_row = (unit * pulled).sum(-1).view(layers, groups * chunks, rank)
        d_scalers.append(per_row.sum(1).to(scaler.dtype))
        d_weight[..., columns] = torch.bmm((unit * scales).to(compute).mT, wanted)
        d_biases.append(grad[:, :, generated:].float().sum(0))
    d_rows = inverse * (d_unit - unit * (unit * d_unit).sum(-1, keepdim=True))
    d_latents = d_rows.to(latents.dtype).view(layers, groups, chunks, rank, depth)
    d_latents = d_latents.permute(1, 2, 0, 3, 4).contiguous()
    return d_latents, d_weight, *d_scalers, *d_biases


def aot_cases() -> list[AotCase]:
    """The kernel with every configuration at the 500M shape; half precision with a bias."""
    return [
        _aot_case(architecture, entry["where"], entry["config"])
        for section, architecture in SECTIONS.items()
        for entry in device.table(OP)[section]
    ]


def _aot_case(
    architecture: str, where: Mapping[str, int | str], config: Mapping[str, int]
) -> AotCase:
    half, depth = where["inputs"] == "half", 512
    size, tensor = (2, "*bf16") if half else (4, "*fp32")
    tile = {name: value for name, value in config.items() if name.startswith("BLOCK_")}
    constants = {
        **tile,
        **dict.fromkeys(
            ("stride_xz", "stride_wd", "stride_sar", "stride_sbr", "stride_bad", "stride_bbd"), 1
        ),
        **dict.fromkeys(() if half else ("bias_a", "bias_b"), None),
        "PRECISION": "tf32" if half else "ieee",
    }
    tensors = {"latents", "weight", "scaler_a", "scaler_b", "bias_a", "bias_b", "out_a", "out_b"}
    signature = {
        name: tensor if name in tensors else "i32"
        for name in _project.arg_names
        if name not in constants
    }
    lengths = {"groups", "chunks", "shared", "layers"}
    m, n = tile["BLOCK_M"], tile["BLOCK_N"]
    blocks = " ".join(f"{name[-1]}{value}" for name, value in tile.items())
    return AotCase(
        name=f"{OP} {tensor[1:]} {blocks} {architecture}",
        function=_project,
        signature=signature,
        constexprs=constants,
        divisible=frozenset(k for k, kind in signature.items() if kind == "i32") - lengths,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        architecture=architecture,
        expects_mma=half,
        flops=2 * m * n * depth,
        bytes=size * (m * depth + depth * n + m * n),
    )
