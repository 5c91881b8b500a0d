"""Deterministic pseudo-random tensors from a name and a shape: the weights of golden networks.

Pure numpy and bit-exact on any machine, so that large golden networks need not be stored.
value[i] = float32(mean + std · sqrt(12) · (hash(i, crc32(name)) / 2³² - 0.5)), i the C-order index.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from torch import Tensor

STEP = 1 << 20


def formula_tensor(
    name: str, shape: tuple[int, ...], mean: float = 0.0, std: float = 1.0, first: int = 0
) -> Tensor:
    """float32 tensor of ``shape``, the formula's values from flat index ``first`` on."""
    seed = np.uint32(zlib.crc32(name.encode()))
    count = math.prod(shape)
    out = np.empty(count, dtype=np.float32)
    with np.errstate(over="ignore"):
        for start in range(0, count, STEP):
            stop = min(count, start + STEP)
            index = np.arange(first + start, first + stop, dtype=np.uint32)
            hashed = _mix(index * np.uint32(2654435761) + seed)
            hashed = _mix(hashed ^ (seed * np.uint32(0x9E3779B9)))
            uniform = hashed.astype(np.float64) / 2.0**32 - 0.5
            out[start:stop] = mean + std * math.sqrt(12.0) * uniform
    return torch.from_numpy(out.reshape(shape))


def _mix(x: np.ndarray) -> np.ndarray:
    """MurmurHash3's 32-bit finalizer."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x85EBCA6B)
    x = x ^ (x >> np.uint32(13))
    x = x * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def hypernet_parameter(name: str, shape: tuple[int, ...], first: int = 0) -> Tensor:
    """A hypernetwork parameter of the golden networks, or its part from index ``first`` on."""
    mean, std = _law(name, shape)
    return formula_tensor(f"param:{name}", shape, mean, std, first)


def _law(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    by_start = {
        "head.": (0.0, 0.02),
        "scaler_A.": (1.0, 0.3),
        "scaler_B.": (0.0, 0.5),
        "bias_A.": (0.0, 0.014),
        "bias_B.": (0.0, 0.008),
    }
    for start, law in by_start.items():
        if name.startswith(start):
            return law
    if name.endswith("latents_q"):
        return 0.0, 1.0
    if "layernorm" in name or name in ("layers.0.mlp.0.weight", "layers.0.mlp.6.weight"):
        return 1.0, 0.3
    if len(shape) == 1:
        return 0.0, 0.2
    gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
    return 0.0, gain / math.sqrt(shape[-1])
