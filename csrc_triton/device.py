"""What is known about a GPU: its capability, its peak rates, and the launch configurations for it.

Tuned choices are data. ``<op>/configs.json`` lists entries under ``sm_80``, ``sm_90`` and
``default`` (sm_86, sm_89 and every unknown GPU; at most 99 KB of shared memory a block)::

    {"sm_90": [{"where": {"kernel": "shrink", "rank": 32, "width": 2560},
                "config": {"BLOCK_T": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}}]}

``where`` is the shape that the entry was chosen for: strings must match exactly, numbers match by
nearest ratio, and keys it does not name are ignored. ``config`` holds the launch's block sizes,
num_warps and num_stages.

``faster.json`` lists, by architecture and op, where the fused path replaces the reference:
``{"sm_90": {"perceiver_attention": [{"slices": [32, 4096]}]}}`` gives the inclusive range of each
number (null for an open end) or the string it must equal. The rules that ship follow from the
roofline at the head of each op's file, the tiles from predictions of ``profiling.model``;
``bench/runs/tune.py`` rewrites these files from what it measures on a GPU.

``PEAKS`` is the one table behind model FLOPs utilization and rooflines: dense bfloat16 FLOP/s and
device memory bytes/s. Datasheet values are the vendors'. Measured values are what a card reached on
random data: the rate of an 8,192 x 8,192 x 8,192 bfloat16 product by cuBLAS, and of a
device-to-device copy, counting bytes read and written.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

Capability = tuple[int, int] | None


@functools.cache
def capability(device: torch.device) -> Capability:
    """Compute capability of a CUDA device; None for any other device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def architecture(capability: Capability) -> str:
    """The section of the configuration files that serves a compute capability."""
    return {(8, 0): "sm_80", (9, 0): "sm_90"}.get(capability or (0, 0), "default")


def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel can be launched while the one before it runs, and wait for its end (PDL)."""
    known = capability(device)
    return known is not None and known >= (9, 0)


def file_of(name: str) -> str:
    """Path of a configuration file below the package: of an op, or of "faster"."""
    return "faster.json" if name == "faster" else f"{name}/configs.json"


@functools.cache
def table(name: str) -> dict[str, Any]:
    """The parsed configuration file of an op, or of "faster"; do not modify it."""
    return json.loads(resources.files("csrc_triton").joinpath(file_of(name)).read_text())


def _distance(where: Mapping[str, Any], shape: Mapping[str, float | str]) -> float:
    """Squared distance in log space over the numbers both name; inf when a string differs."""
    total = 0.0
    for name, expected in where.items():
        value = shape.get(name)
        if isinstance(expected, str) or isinstance(value, str):
            if value != expected:
                return math.inf
        elif value is not None:
            total += math.log(max(expected, 1) / max(value, 1)) ** 2
    return total


# An op looks up at every call, from a handful of shapes while it decodes.
@functools.lru_cache(maxsize=4096)
def _nearest(
    op: str, capability: Capability, key: tuple[tuple[str, float | str], ...]
) -> Mapping[str, int]:
    entries, shape = table(op), dict(key)
    for section in dict.fromkeys((architecture(capability), "default")):
        ranked = [(_distance(entry["where"], shape), entry) for entry in entries.get(section, ())]
        distance, nearest = min(ranked, key=lambda pair: pair[0], default=(math.inf, None))
        if nearest is not None and distance < math.inf:
            return nearest["config"]
    raise KeyError(f"{op}/configs.json has no entry for {shape} on {architecture(capability)}")


def lookup(op: str, capability: Capability, **shape: float | str) -> dict[str, int]:
    """The launch configuration tuned for the nearest shape; the first of equally near ones.

    Args:
        op: name of the op's folder.
        capability: of the device; None (CPU, interpreter) gets the defaults.
        shape: numbers (compared by ratio) and strings (compared exactly).

    Returns:
        A new dict: block sizes, num_warps, num_stages.

    Raises:
        KeyError: no entry matches the strings of the shape.
    """
    return dict(_nearest(op, capability, tuple(shape.items())))


def clear_cache() -> None:
    """Read the files again at the next call, after they were rewritten."""
    table.cache_clear()
    _nearest.cache_clear()


def _within(expected: str | list[float | None], value: float | str | None) -> bool:
    if value is None or isinstance(value, str) or isinstance(expected, str):
        return value == expected
    low, high = expected
    return (low is None or low <= value) and (high is None or value <= high)


def prefers_fused(op: str, capability: Capability, **shape: float | str) -> bool:
    """Whether ``faster.json`` selects the op's fused path for this shape."""
    rules = table("faster").get(architecture(capability), {}).get(op, ())
    return any(
        all(_within(expected, shape.get(name)) for name, expected in rule.items()) for rule in rules
    )


# --- peak rates ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peak:
    """Limits of a GPU.

    Attributes:
        flops: dense bfloat16 FLOP/s of the datasheet.
        bandwidth: bytes/s of the datasheet.
        measured_flops, measured_bandwidth: measured rates, None where not measured.
    """

    flops: float
    bandwidth: float
    measured_flops: float | None = None
    measured_bandwidth: float | None = None

    @property
    def reachable_flops(self) -> float:
        """Measured FLOP/s, or the datasheet's."""
        return self.measured_flops or self.flops

    @property
    def reachable_bandwidth(self) -> float:
        """Measured bytes/s, or the datasheet's."""
        return self.measured_bandwidth or self.bandwidth

    def floor(self, flops: float, bytes: float) -> float:
        """Lower bound in seconds for a kernel with these numbers of operations and bytes."""
        return max(flops / self.reachable_flops, bytes / self.reachable_bandwidth)


# By a part of the device's name. The first match counts, so longer names come first.
PEAKS = {
    "GB200": Peak(2.5e15, 8.0e12),
    "B200": Peak(2.25e15, 8.0e12),
    "GH200": Peak(989e12, 4.0e12),
    "H200": Peak(989e12, 4.8e12, 788e12, 4.3e12),
    "H100 PCIe": Peak(756e12, 2.0e12),
    "H100 NVL": Peak(835e12, 3.9e12),
    "H100": Peak(989e12, 3.35e12, 798e12, 3.0e12),
    "A100-SXM4-40GB": Peak(312e12, 1.555e12),
    "A100-PCIE-40GB": Peak(312e12, 1.555e12),
    "A100": Peak(312e12, 2.0e12),
    "L40S": Peak(362e12, 0.864e12),
    "A10G": Peak(70e12, 0.6e12),
    "A10": Peak(125e12, 0.6e12),
    "L4": Peak(121e12, 0.3e12),
    "RTX 4090": Peak(165e12, 1.008e12),
    "RTX 3090": Peak(71e12, 0.936e12),
}


def peak_of(device_name: str) -> Peak | None:
    """The peak of a GPU by the name that PyTorch reports, or None if it is not listed."""
    return next((peak for known, peak in PEAKS.items() if known in device_name), None)
