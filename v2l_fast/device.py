"""Work for the model's device: copies that do not wait for it, and compiled functions.

Compiled functions are full graphs, one for all lengths. Callers compile functions that take their
object as an argument, so that a deep copy of the object runs on its own weights.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

# Maximum graphs per function. Lengths share a graph, but prefill and decoding, one example and
# several, adapters or none, equal and ragged ranks, and each kind of gradient recording have their
# own: a process that does all of it exceeds Dynamo's recompile limit of 8 and raises.
GRAPHS = 64
# The compiler's settings are per thread and per asynchronous task.
_settled: ContextVar[bool] = ContextVar("settled", default=False)


def send(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``tensor`` on ``device``, cast there to ``dtype`` if given.

    CPU memory is pinned first: a copy to a GPU from pageable memory would wait for everything
    enqueued before it.
    """
    if device.type == "cuda" and not tensor.is_cuda and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True).to(dtype or tensor.dtype)


def compiled(function: Callable, backend: str = "inductor") -> Callable:
    """Compile a function as one graph with symbolic lengths and indices from the first call on.

    Args:
        function: called with positional arguments only.
        backend: as for ``torch.compile``.
    """
    run = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)

    def call(*args: Any) -> Any:
        if not _settled.get():
            _settle()
        return run(*args)

    return call


def _settle() -> None:
    # Importing the compiler takes seconds, which a run without it should not spend.
    import torch._dynamo.config as settings
    import torch.fx.experimental._config as shapes

    settings.recompile_limit = max(settings.recompile_limit, GRAPHS)
    # Otherwise sizes that happen to be equal in the first call (as many examples as layers) share a
    # symbol, and the next call compiles again.
    shapes.use_duck_shape = False
    # The graphs are single layers: splitting them where DDP reduces gradients gains nothing.
    settings.optimize_ddp = False
    _settled.set(True)
