"""Runs Triton's interpreter instead of its compiler, temporarily and in this process.

TRITON_INTERPRET normally counts when a kernel is decorated, so that a process either compiles or
interprets. Here the decorated functions are replaced instead. Triton patches its language at every
launch and restores part of it; here it is patched once and restored as a whole, so that kernels can
still be compiled afterwards.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import numpy
import pytest
import triton
import triton.language as tl
from triton.runtime import JITFunction, interpreter

from csrc_triton.lora_linear import kernels as lora_linear
from csrc_triton.perceiver_attention import kernels as perceiver_attention
from csrc_triton.rank_projection import kernels as rank_projection

MODULES = (tl, tl.standard, lora_linear, perceiver_attention, rank_projection)
_INTERPRETED: dict[int, interpreter.InterpretedFunction] = {}


def check_versions(triton_version: str, numpy_version: str) -> None:
    """Raise RuntimeError, with the remedy, where Triton's interpreter does not run."""
    old, new = (
        tuple(map(int, re.findall(r"\d+", version)[:2]))
        for version in (triton_version, numpy_version)
    )
    if old < (3, 7) and new >= (2, 4):
        raise RuntimeError(
            f"the interpreter of triton {triton_version} does not run with numpy {numpy_version}: "
            "install numpy<2.4 or triton>=3.7"
        )


@contextlib.contextmanager
def interpreted(*others: ModuleType) -> Iterator[None]:
    """Inside, launches of this package's kernels, and of those in ``others``, are interpreted."""
    check_versions(triton.__version__, numpy.__version__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for module in (*MODULES, *others):
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    function = _INTERPRETED.get(id(value))
                    if function is None:
                        function = interpreter.InterpretedFunction(value.fn)
                        _INTERPRETED[id(value)] = function
                    patch.setattr(module, name, function)
        language = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
        scope = interpreter._patch_lang(language)
        patch.setattr(interpreter, "_patch_lang", lambda fn: interpreter._LangPatchScope())
        try:
            yield
        finally:
            scope.restore()
