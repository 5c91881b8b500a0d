"""What is needed to compile a kernel without a GPU, and what the result must look like.

Every op's ``kernels.py`` has a function ``aot_cases() -> list[AotCase]``: each of its kernels with
each entry of its ``configs.json`` (those under ``default`` for sm_86), at the shape the entry was
chosen for. Listing the cases compiles nothing; ``profiling/aot_report.py`` compiles them and reads
the result.

Needs no triton itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The architecture that each section of a configuration file is compiled for.
SECTIONS = {"sm_80": "sm_80", "sm_90": "sm_90", "default": "sm_86"}


@dataclass(frozen=True)
class AotCase:
    """One kernel in one configuration for one architecture, as a launch would specialize it.

    Attributes:
        name: unique, starts with the op: "lora_linear.shrink bf16 r32 sm_90".
        function: what ``@triton.jit`` or ``@gluon.jit`` returned.
        signature: argument name -> Triton type, for every argument that is not constexpr, in any
            order: "*bf16", "*fp32", "*i64", "i32", "i64", "fp32", and of Gluon "tensordesc<...>".
        constexprs: argument name -> value, for every other argument. A launch turns an integer
            equal to 1 into a constant and drops arguments that are None: the stride of a
            contiguous axis is therefore 1 here, and an absent tensor None.
        divisible: integer arguments that the launch passes as multiples of 16: strides, widths.
            Not those under ``do_not_specialize``. Pointers always are multiples of 16.
        num_warps, num_stages: of the configuration.
        architecture: "sm_80" or "sm_90"; "sm_86" for entries under ``default``.
        expects_mma: whether tensor cores must appear: HMMA, on sm_90 HMMA or HGMMA.
        flops: of one program's useful work, for the table.
        bytes: that one program must move from and to DRAM, for the table.
        iterations: of the main loop in one program.
        expects_overlap: whether copies to shared memory must overlap products. Not where buffers
            for it do not fit.
        tma_bytes: that one iteration copies by TMA, ``num_stages - 1`` iterations ahead.
    """

    name: str
    function: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    divisible: frozenset[str]
    num_warps: int
    num_stages: int
    architecture: str
    expects_mma: bool
    flops: float
    bytes: float
    iterations: int = 1
    expects_overlap: bool = True
    tma_bytes: int = 0

    @property
    def half(self) -> bool:
        """Whether it computes in half precision."""
        return any(kind in ("*bf16", "*fp16") for kind in self.signature.values())
