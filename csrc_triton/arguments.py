"""Checks of an op's arguments, whose errors name the argument, what it must be and what it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Arguments:
    """Checks of the arguments of one op; every method skips tensors that are None.

    Attributes:
        op: the op's name, which starts every error.
    """

    op: str

    def require(self, holds: bool, name: str, expected: str, got: object) -> None:
        """Raise ValueError unless ``holds``."""
        if not holds:
            raise ValueError(f"{self.op}: {name} must be {expected}, got {got}")

    # The methods below run at every call of the op: they format nothing unless a check fails.

    def shape(self, name: str, tensor: Tensor | None, *sizes: int | str) -> None:
        """Require a shape; a string names an axis of any size."""
        if tensor is None:
            return
        if len(sizes) != tensor.dim() or any(
            not isinstance(size, str) and size != actual
            for size, actual in zip(sizes, tensor.shape, strict=True)
        ):
            self.require(False, name, f"[{', '.join(map(str, sizes))}]", list(tensor.shape))

    def floating(self, **tensors: Tensor | None) -> None:
        """Require floating-point dtypes."""
        for name, tensor in tensors.items():
            if tensor is not None:
                self.require(tensor.is_floating_point(), name, "floating point", tensor.dtype)

    def dtype(self, *dtypes: torch.dtype, **tensors: Tensor | None) -> None:
        """Require one of the dtypes."""
        for name, tensor in tensors.items():
            if tensor is not None and tensor.dtype not in dtypes:
                self.require(False, name, " or ".join(map(str, dtypes)), tensor.dtype)

    def device(self, device: torch.device, **tensors: Tensor | None) -> None:
        """Require a device."""
        for name, tensor in tensors.items():
            if tensor is not None and tensor.device != device:
                self.require(False, name, f"on {device}", tensor.device)
