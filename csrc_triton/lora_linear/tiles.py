"""What the kernels of lora_linear share: the tokens of a tile, the ranks in use, the tables.

A tile of tokens belongs to one example. Example e owns the tiles from offset[e] // BLOCK_T + e on,
so that a program finds its example by counting and the grid, total // BLOCK_T + E, is known without
reading the device.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton import device

OP = "lora_linear"

Config = Mapping[str, Mapping[str, int | str]]


@triton.jit
def rows_of_tile(tile, offsets, tokens, examples, BLOCK_T: tl.constexpr):
    """(example, first row, row after the example's last); no rows when first >= end."""
    if offsets is None:
        per_example = tl.cdiv(tokens, BLOCK_T)
        example = tile // per_example
        begin = example.to(tl.int64) * tokens
        first = begin + (tile - example * per_example) * BLOCK_T
        end = begin + tokens
    else:
        started = 0
        for base in range(0, examples, 128):
            e = base + tl.arange(0, 128)
            begins = tl.load(offsets + e, mask=e < examples, other=0)
            started += tl.sum(((begins // BLOCK_T + e <= tile) & (e < examples)).to(tl.int32))
        example = started - 1
        begin = tl.load(offsets + example).to(tl.int64)
        end = tl.load(offsets + example + 1).to(tl.int64)
        first = begin + (tile - (begin // BLOCK_T + example)) * BLOCK_T
    return example, first, end


@triton.jit
def used_rank(adapter, ranks, rank, adapters):
    """Rank slots in use; 0 for no adapter. An index out of range reads nothing."""
    exists = (adapter >= 0) & (adapter < adapters)
    if ranks is None:
        used = rank
    else:
        used = tl.minimum(tl.load(ranks + adapter, mask=exists, other=0).to(tl.int32), rank)
    return tl.where(exists, used, 0)


def chosen(kernel: str, x: Tensor, config: Config | None, **key: int | str) -> dict[str, int | str]:
    """Tile (or form) of a kernel: from ``config`` where it names the kernel, else the table's."""
    if config is not None and kernel in config:
        return dict(config[kernel])
    inputs = "single" if x.dtype == torch.float32 else "half"
    return device.lookup(OP, device.capability(x.device), kernel=kernel, inputs=inputs, **key)


def block_of_ranks(largest: int, rank: int) -> int:
    """No wider than the ranks there are; tl.dot needs 16."""
    return min(largest, max(16, triton.next_power_of_2(rank)))


def precision(x: Tensor) -> str:
    """Of tl.dot; the word matters to float32 alone."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def per_example(rows: Tensor, adapter_index: Tensor, offsets: Tensor | None) -> int:
    """Tokens an example: all have as many without offsets, else the average."""
    examples = max(1, adapter_index.numel())
    return rows.shape[0] // examples if offsets is None else -(-rows.shape[0] // examples)


def token_tiles(rows: int, examples: int, tokens: int, packed: bool, block: int) -> int:
    """How many tiles of ``block`` tokens a grid needs."""
    return rows // block + examples if packed else examples * -(-tokens // block)
