"""Which path an op takes: its Triton kernels or the plain torch reference.

``V2L_BACKEND`` decides, read at every call:

- ``reference``: plain torch everywhere.
- ``triton``: the kernels everywhere; a call they cannot serve raises.
- ``auto`` (default): the kernels on a GPU where ``csrc_triton/configs/faster.json`` marks the op
  and shape (by the roofline until ``bench/tune.py`` has measured that GPU), else the reference.

Before an op's kernels are first launched on a GPU in half precision, they must get sums of small
integers right (``canary.py``): ``auto`` keeps to the reference and warns when they do not,
``triton`` raises.

Nothing here imports triton; the ops import their kernels when told to use them.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch
from torch import Tensor

from csrc_triton import canary, configs

VARIABLE = "V2L_BACKEND"
BACKENDS = ("auto", "reference", "triton")
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device; None for any other, which gets the default tiles."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _obstacle(tensors: list[Tensor]) -> str | None:
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


def choice() -> str:
    """The value of ``V2L_BACKEND``.

    Raises:
        RuntimeError: it is none of auto, reference and triton.
    """
    found = os.environ.get(VARIABLE, "auto")
    if found not in BACKENDS:
        raise RuntimeError(f"{VARIABLE}={found!r}: must be one of {', '.join(BACKENDS)}")
    return found


@functools.cache
def _flaw(op: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """What the kernels of an op get wrong on a GPU; None when they are right. Judged once."""
    wrong = {name: canary.wrong_elements(name, dtype, device) for name in canary.of_op(op)}
    found = ", ".join(f"{count} wrong in {name}" for name, count in wrong.items() if count)
    if not found:
        return None
    gpu = torch.cuda.get_device_name(device)
    return f"the kernels compiled for {gpu} fail their self-check in {dtype} ({found})"


def _checked(op: str | None, tensor: Tensor) -> str | None:
    """As :func:`_flaw`, where there is one to look for: products of half precision on a GPU."""
    if op is None or tensor.device.type != "cuda" or tensor.dtype == torch.float32:
        return None
    # What a graph captures was launched, and judged, while warming up.
    if torch.cuda.is_current_stream_capturing():
        return None
    return _flaw(op, tensor.dtype, tensor.device)


@functools.cache
def _warn(flaw: str) -> None:
    warnings.warn(f"{flaw}; plain torch takes their place", RuntimeWarning, stacklevel=2)


def prefers_fused(op: str, tensor: Tensor, **shape: float | str) -> bool:
    """Whether ``configs/faster.json`` sends this shape on this tensor's GPU to the fused path."""
    if tensor.device.type != "cuda":
        return False
    inputs = "single" if tensor.dtype == torch.float32 else "half"
    return configs.prefers_fused(op, capability(tensor.device), inputs=inputs, **shape)


def use_triton(*tensors: Tensor | None, op: str | None = None, **shape: float | str) -> bool:
    """Whether an op shall launch its Triton kernels for these inputs.

    Args:
        tensors: the op's inputs; None stands for one that is absent. Integer and bool tensors
            count for their device only.
        op, shape: what ``auto`` looks up in ``configs/faster.json``, next to the word "inputs"
            (half or single); without ``op`` it takes the reference.

    Raises:
        RuntimeError: ``V2L_BACKEND`` is none of auto, reference and triton, or it is triton and
            the kernels cannot serve the call: no triton, tensors not on a GPU without
            ``TRITON_INTERPRET=1``, float64 or another dtype, bfloat16 in the interpreter, or
            kernels that fail their self-check on this GPU.
    """
    wanted = choice()
    if wanted == "reference":
        return False
    present = [tensor for tensor in tensors if tensor is not None]
    if wanted == "triton":
        if obstacle := _obstacle(present):
            raise RuntimeError(f"{VARIABLE}=triton: {obstacle}, or set {VARIABLE}=auto")
        if present and (flaw := _checked(op, present[0])):
            raise RuntimeError(f"{VARIABLE}=triton: {flaw}; set {VARIABLE}=reference")
        return True
    if op is None or not present or not prefers_fused(op, present[0], **shape):
        return False
    if _obstacle(present) is not None:
        return False
    if flaw := _checked(op, present[0]):
        _warn(flaw)
        return False
    return True
