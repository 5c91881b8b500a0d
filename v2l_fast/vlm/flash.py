"""FlashAttention 2 for one-token steps over the static cache, where it is installed.

Passes without a mask (contexts, prompts, answers in training: all causal, right-padded) already run
in a kernel of the same class inside PyTorch. A step is the exception. Its rows have lengths of
their own. PyTorch is told them by a mask, reads every row as far as the longest, and is given
copies of rows that are picked from the cache; FlashAttention takes cache, rows and lengths.

Which attention is used follows from what is there; ``V2L_BACKEND=reference`` keeps to PyTorch's.
"""

from __future__ import annotations

import importlib.metadata

import torch
from torch import Tensor

from csrc_triton import dispatch


def usable(cache: Tensor) -> bool:
    """Whether steps over this cache [..., capacity, head_dim] go to FlashAttention 2.

    It takes float16 and bfloat16 on Ampere and later GPUs, heads of up to 256 in steps of 8.
    """
    return (
        cache.device.type == "cuda"
        and cache.dtype in (torch.float16, torch.bfloat16)
        and cache.shape[-1] <= 256
        and cache.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(cache.device) >= (8, 0)
        and dispatch.requested_backend() != "reference"
        and _installed()
    )


def _installed() -> bool:
    # The distribution tells; flash-attn-4 has the same import name and cannot do this on sm_80.
    try:
        return importlib.metadata.version("flash-attn").startswith("2.")
    except importlib.metadata.PackageNotFoundError:
        return False


@torch.library.custom_op("v2l_fast::flash_decode", mutates_args=())
def flash_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention of one query token a row over what its cache row holds.

    Args:
        query: [E, heads, 1, head_dim], rotated.
        keys, values: [rows, kv heads, capacity, head_dim], the step's own already written.
        lengths: [E] int32, tokens of each row to attend to, from 1.
        rows: [E] int32, each query's row of the cache; None: the first E.
        scale: of the products.

    Returns:
        [E, heads, 1, head_dim].
    """
    from flash_attn import flash_attn_with_kvcache

    mixed = flash_attn_with_kvcache(
        query.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        cache_seqlens=lengths,
        cache_batch_idx=rows,
        softmax_scale=scale,
    )
    return mixed.transpose(1, 2).contiguous()


@flash_decode.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)
