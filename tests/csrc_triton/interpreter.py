"""Runs Triton's interpreter instead of its compiler, temporarily and in this process.

TRITON_INTERPRET normally counts when a kernel is decorated, so that a process either compiles or
interprets. Here the decorated functions are replaced instead. Triton patches its language at every
launch and restores part of it; here it is patched once and restored as a whole, so that kernels can
still be compiled afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import triton.language as tl
from triton.runtime import JITFunction, interpreter

from csrc_triton.lora_linear import kernels as lora_linear
from csrc_triton.perceiver_attention import kernels as perceiver_attention
from csrc_triton.rank_projection import kernels as rank_projection

MODULES = (tl, tl.standard, lora_linear, perceiver_attention, rank_projection)
_INTERPRETED: dict[int, interpreter.InterpretedFunction] = {}


@contextlib.contextmanager
def interpreted(*others: ModuleType) -> Iterator[None]:
    """Inside, launches of this package's kernels, and of those in ``others``, are interpreted."""
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
