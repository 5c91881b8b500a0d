"""Peak rates of GPUs: dense bfloat16 FLOP/s and device memory bytes/s.

The one table behind model FLOPs utilization and rooflines. Datasheet values are the vendors'.
Measured values are what a card reached on random data: the rate of an 8,192 x 8,192 x 8,192
bfloat16 product by cuBLAS, and of a device-to-device copy, counting bytes read and written.
"""

from __future__ import annotations

from dataclasses import dataclass


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
        """Least seconds that a kernel of so many operations and bytes can take."""
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
