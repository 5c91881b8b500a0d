"""Chooses between an op's Triton kernels and its plain PyTorch reference.

``V2L_BACKEND`` decides, read at every call:

- ``reference``: plain PyTorch everywhere.
- ``triton``: the kernels everywhere; a call that they cannot serve raises.
- ``auto`` (default): the kernels on a GPU where ``faster.json`` selects the op and shape, else the
  reference.

Before an op's kernels are first launched on a GPU in half precision they must pass the op's
self-check (``self_check.py``): if they fail, ``auto`` uses the reference and warns, and ``triton``
raises.

This module knows no op: each op registers itself as an :class:`Op`. Nothing here imports triton; an
op's kernels are imported when they are first chosen.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from csrc_triton import device, self_check

VARIABLE = "V2L_BACKEND"
BACKENDS = ("auto", "reference", "triton")
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def requested_backend() -> str:
    """The value of ``V2L_BACKEND``.

    Raises:
        RuntimeError: it is none of auto, reference and triton.
    """
    value = os.environ.get(VARIABLE, "auto")
    if value not in BACKENDS:
        raise RuntimeError(f"{VARIABLE} must be one of {', '.join(BACKENDS)}, got {value!r}")
    return value


def prefers_fused(op: str, tensor: Tensor, **shape: float | str) -> bool:
    """Whether ``faster.json`` selects the fused path for this shape on this tensor's GPU.

    The tensor's dtype is passed to the rules as "inputs": "half" or "single".
    """
    if tensor.device.type != "cuda":
        return False
    inputs = "single" if tensor.dtype == torch.float32 else "half"
    return device.prefers_fused(op, device.capability(tensor.device), inputs=inputs, **shape)


@dataclass(frozen=True, eq=False)
class Op:
    """An op with two implementations: modules that define the same functions.

    Attributes:
        name: as in ``faster.json`` and in error messages.
        reference: the module of the plain PyTorch definition.
        load_kernels: imports and returns the module of the Triton kernels.
        self_checks: by name; together they launch every kernel that ``auto`` may choose.
    """

    name: str
    reference: ModuleType
    load_kernels: Callable[[], ModuleType]
    self_checks: Mapping[str, self_check.SelfCheck]

    def implementation(self, *tensors: Tensor | None, **shape: float | str) -> ModuleType:
        """The module to call for these inputs.

        Args:
            tensors: the op's inputs, None for an absent one. Integer and bool tensors count for
                their device only.
            shape: what ``auto`` looks up in ``faster.json``.

        Raises:
            RuntimeError: ``V2L_BACKEND`` is none of auto, reference and triton, or it is triton and
                the kernels cannot serve the call: triton is not installed, a tensor is not on a GPU
                and ``TRITON_INTERPRET`` is not set, a dtype is not supported, or the kernels fail
                their self-check on this GPU.
        """
        return self.load_kernels() if self._uses_kernels(tensors, shape) else self.reference

    def _uses_kernels(
        self, tensors: Sequence[Tensor | None], shape: Mapping[str, float | str]
    ) -> bool:
        backend = requested_backend()
        if backend == "reference":
            return False
        present = [tensor for tensor in tensors if tensor is not None]
        if backend == "triton":
            if obstacle := _obstacle(present):
                raise RuntimeError(f"{VARIABLE}=triton: {obstacle}, or set {VARIABLE}=auto")
            if failure := self._failure(present[0]):
                raise RuntimeError(f"{VARIABLE}=triton: {failure}; set {VARIABLE}=reference")
            return True
        if not prefers_fused(self.name, present[0], **shape) or _obstacle(present) is not None:
            return False
        if failure := self._failure(present[0]):
            _warn(failure)
            return False
        return True

    def _failure(self, tensor: Tensor) -> str | None:
        """Why the kernels fail their self-check; None when they pass or none applies."""
        if tensor.device.type != "cuda" or tensor.dtype == torch.float32:
            return None
        # What a graph captures was launched, and checked, during warm-up.
        if torch.cuda.is_current_stream_capturing():
            return None
        return _self_check_failure(self, tensor.dtype, tensor.device)

    def wrong_elements(
        self, check: str, dtype: torch.dtype, device: torch.device, small: bool = False
    ) -> int:
        """Run one of the self-checks and count the wrong elements."""
        return self_check.wrong_elements(
            self.self_checks[check], self.load_kernels(), self.reference, dtype, device, small
        )


@functools.cache
def _self_check_failure(op: Op, dtype: torch.dtype, gpu: torch.device) -> str | None:
    """Runs an op's self-checks, once for a dtype and GPU; None when all pass."""
    counts = {name: op.wrong_elements(name, dtype, gpu) for name in op.self_checks}
    failed = ", ".join(f"{count} wrong in {name}" for name, count in counts.items() if count)
    if not failed:
        return None
    return (
        f"the {op.name} kernels compiled for {torch.cuda.get_device_name(gpu)} fail their "
        f"self-check in {dtype} ({failed})"
    )


@functools.cache
def _warn(failure: str) -> None:
    warnings.warn(f"{failure}; using plain PyTorch instead", RuntimeWarning, stacklevel=2)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _obstacle(tensors: Sequence[Tensor]) -> str | None:
    """Why the kernels cannot take these tensors, with the remedy; None when they can."""
    if not _has_triton():
        return "triton is not installed; install it"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for tensor in tensors:
        if tensor.device.type != "cuda" and not interpreted:
            return f"a tensor is on {tensor.device}; move it to a GPU or set TRITON_INTERPRET=1"
        if not tensor.is_floating_point():
            continue
        if tensor.dtype not in KERNEL_DTYPES:
            return f"a tensor is {tensor.dtype}; use float16, bfloat16 or float32"
        if interpreted and tensor.dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly; use float16 or float32"
    return None
