"""What both files of lora_linear kernels use: ranks in use, tuned tiles, precision of products."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton import device

OP = "lora_linear"

# Tile sizes by the name of the kernel.
Config = Mapping[str, Mapping[str, int]]


@triton.jit
def used_rank(adapter, ranks, rank, adapters):
    """Number of rank slots in use; 0 for no adapter. An index out of range reads nothing."""
    exists = (adapter >= 0) & (adapter < adapters)
    if ranks is None:
        used = rank
    else:
        used = tl.minimum(tl.load(ranks + adapter, mask=exists, other=0).to(tl.int32), rank)
    return tl.where(exists, used, 0)


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
