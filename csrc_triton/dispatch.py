"""Chooses between an op's Triton kernels and its plain PyTorch reference.

``V2L_BACKEND`` decides, read at every call:

- ``reference``: plain PyTorch everywhere.
- ``triton``: the kernels everywhere; a call that they cannot serve raises.
- ``auto`` (default): the kernels on a GPU where ``faster.json`` selects the op and shape, else the
  reference.

Before an op's kernels are first launched on a GPU in half precision they must pass the op's
self-checks: if they fail, ``auto`` uses the reference and warns, and ``triton`` raises. The results
of a self-check are small integers, which every dtype holds exactly, so they do not depend on the
order of a sum, and every bit must be right: a compiler that miscompiles a pipelined product is
detected (ptxas before 13.3, triton#9433). The checks use the sizes of the 500M shape with few rows,
so that they launch the tiles of real calls. Tolerances, odd shapes and strides are what
``tests/csrc_triton`` covers.

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

from csrc_triton import device

VARIABLE = "V2L_BACKEND"
BACKENDS = ("auto", "reference", "triton")
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# bfloat16 holds every integer up to this one.
LARGEST_INTEGER = 256

# Runs an implementation of the op (its module ``kernels`` or ``reference``) on the check's inputs
# in a dtype, and returns outputs and gradients.
Run = Callable[[ModuleType, torch.dtype], list[Tensor]]
# Builds the inputs: (device, small) -> Run. ``small`` selects sizes for Triton's interpreter.
SelfCheck = Callable[[torch.device, bool], Run]


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
    self_checks: Mapping[str, SelfCheck]

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
        key = self, tensor.dtype, tensor.device
        if key not in _verdicts:
            if torch.cuda.is_current_stream_capturing():
                return f"the {self.name} kernels were not checked before this graph capture"
            _verdicts[key] = _self_check_failure(*key)
        return _verdicts[key]

    def wrong_elements(
        self, check: str, dtype: torch.dtype, device: torch.device, small: bool = False
    ) -> int:
        """Number of wrong elements in the kernels' outputs and gradients of a self-check.

        Waits for the device.
        """
        with torch.no_grad():
            run = self.self_checks[check](device, small)
            outputs, expected = run(self.load_kernels(), dtype), run(self.reference, torch.float32)
            wrong = [(o.float() != e).sum() for o, e in zip(outputs, expected, strict=True)]
            return int(torch.stack(wrong).sum())


# Results of the self-checks by op, dtype and GPU; None for passed.
_verdicts: dict[tuple[Op, torch.dtype, torch.device], str | None] = {}


def _self_check_failure(op: Op, dtype: torch.dtype, gpu: torch.device) -> str | None:
    """Run an op's self-checks; None when all pass."""
    try:
        counts = {name: op.wrong_elements(name, dtype, gpu) for name in op.self_checks}
    except Exception as error:
        # No C compiler, no memory, a kernel that does not compile for this GPU.
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        return f"the self-check of the {op.name} kernels in {dtype} failed ({reason})"
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


# --- products of the references --------------------------------------------------------------


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a reference multiplies: x's on the tensor cores of a GPU, else at least
    float32."""
    on_tensor_cores = x.device.type == "cuda" and x.dtype.itemsize == 2
    return x.dtype if on_tensor_cores else torch.promote_types(x.dtype, torch.float32)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """[N, I, J] and [N, J, K] to [N, I, K], accumulated and returned in float32 or wider."""
    if a.dtype.itemsize == 2:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a, b)


def prefers_onednn(x: Tensor) -> bool:
    """Whether :func:`onednn_linear` multiplies these rows faster than the BLAS that PyTorch calls.

    PyTorch multiplies half-precision matrices by oneDNN and float32 ones by MKL. With AVX-512
    oneDNN reaches 103 GFLOP/s a core at the shapes of the modality projection where MKL reaches 87
    to 96 (AMD EPYC 9004), and as much with 256 rows as with 1,024.
    """
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and bool(torch.backends.mkldnn.enabled)
        and _has_onednn_and_avx512()
    )


@functools.cache
def _has_onednn_and_avx512() -> bool:
    # The op is not public: a build or a release without it keeps the BLAS.
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    )


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ of rows [T, D] by oneDNN, without derivatives."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


# --- inputs of self-checks -------------------------------------------------------------------


def generator() -> torch.Generator:
    """A generator with the seed of all self-checks."""
    return torch.Generator().manual_seed(1)


def random_signs(random: torch.Generator, density: float, *shape: int) -> Tensor:
    """A tensor of -1, 0 and 1, of which a share of ``density`` is nonzero."""
    uniform = torch.rand(*shape, generator=random)
    return (uniform < density / 2).float() - (uniform > 1 - density / 2).float()


def sparse_ones(like: Tensor) -> Tensor:
    """A cotangent that is 1 in every 61st element and 0 elsewhere."""
    positions = torch.arange(like.numel(), device=like.device)
    return (positions % 61 == 0).view(like.shape).to(like.dtype)


# --- checks of arguments ---------------------------------------------------------------------


@dataclass(frozen=True)
class Arguments:
    """Checks of the arguments of one op; every method skips tensors that are None.

    An error names the argument, what it must be and what it is.

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
