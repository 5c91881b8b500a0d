"""torch.compile as the package uses it: whole graphs, one for every length.

Only the settings live here. What is compiled is the caller's business: functions that take their
object as an argument, so that a deep copy of the object runs on its own weights.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

# Graphs a function may have. Lengths share one, but prefill and decoding, one example and several,
# adapters or none, equal and ragged ranks, and each kind of gradient recording have their own: a
# process that does all of it passes the compiler's limit of 8, which ends it.
GRAPHS = 64


# The compiler's settings belong to a thread, and to an asynchronous task, each.
_settled: ContextVar[bool] = ContextVar("settled", default=False)


def compiled(function: Callable, backend: str = "inductor") -> Callable:
    """``function`` without a graph break, its lengths and indices symbolic from the first call on.

    Args:
        function: called with positional arguments alone.
        backend: as torch.compile's.
    """
    run = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)

    def call(*args: Any) -> Any:
        if not _settled.get():
            _settle()
        return run(*args)

    return call


def _settle() -> None:
    # Loads the compiler, seconds that a run without it need not spend.
    import torch._dynamo.config as settings
    import torch.fx.experimental._config as shapes

    settings.recompile_limit = max(settings.recompile_limit, GRAPHS)
    # Otherwise sizes that happen to be equal in the first call (as many examples as layers) are
    # taken for the same size, and the next call compiles again.
    shapes.use_duck_shape = False
    _settled.set(True)
