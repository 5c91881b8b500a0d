"""LoRA adapters for each example of a batch in any PyTorch decoder.

:func:`adapted_linear` finds the decoder's linear layers and hooks them; the handle it returns
chooses the adapters. Which adapters are in force where a layer runs is
decided by :mod:`v2l_fast.hypernet.adapter_scope`.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from v2l_fast.errors import AdapterError
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.hypernet.adapter_bank import AdapterBank
from v2l_fast.hypernet.adapter_scope import UNRESOLVED, Scope


@dataclass(frozen=True, eq=False)
class _Site:
    """Forward hook of an adapted layer: adds the update of the adapters in force to its output.

    The layer itself stays as it is: its class, hooks and parametrizations, whatever its weights.
    """

    scope: Scope
    module: str
    layer: int

    def __call__(self, layer: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if not torch.compiler.is_compiling():
            return self._add(self.scope.current(), layer, args, output)
        choice = self.scope.local()
        if choice is UNRESOLVED:
            return self._outside_graph(layer, args, output)
        return self._add(choice, layer, args, output)

    @torch.compiler.disable
    def _outside_graph(self, layer: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        return self._add(self.scope.current(), layer, args, output)

    def _add(
        self, slots: AdapterBank | None, layer: nn.Module, args: tuple, output: Tensor
    ) -> Tensor | None:
        if slots is None:
            return None
        if getattr(layer, "_is_replica", False) and slots.index.unique().numel() > 1:
            raise AdapterError(
                "DataParallel divides the batch, and no replica knows which adapters are those of "
                "its part: use DistributedDataParallel, or one adapter for the whole batch"
            )
        if not args or not isinstance(output, Tensor):
            raise AdapterError(
                f"{self.module} of layer {self.layer} ({type(layer).__name__}) is not called as a "
                "linear layer is, with one tensor for one tensor"
            )
        return output + slots.update(self.module, self.layer, args[0], output)


class AdaptedModel:
    """Handle of a model made adaptable by :func:`adapted_linear`.

    Attributes:
        model: the model, changed by nothing but a forward hook on each adapted layer.
    """

    def __init__(self, model: nn.Module, module: str, layers: Sequence[nn.Module]) -> None:
        self.model = model
        self._module, self._layers = module, list(layers)
        self._scope: Scope | None = Scope()
        for index, layer in enumerate(self._layers):
            # First, so that hooks which watch the layer's output see the adapted one.
            layer.register_forward_hook(_Site(self._scope, module, index), prepend=True)
        _forget_compiled()

    def use(self, adapters: Sequence[Adapter | None]) -> contextlib.AbstractContextManager:
        """Within the block, example i of every batch runs with ``adapters[i]`` (None: without).

        Blocks may be nested and entered again; the innermost one counts. Threads and asyncio tasks
        that the block starts run with its adapters, others are not affected, and nothing is left
        behind. Backward passes may run later, with activation checkpointing too. An adapter of
        several modules needs a handle for each of them.

        Args:
            adapters: one for each row of the batch that reaches the layers, so with beam search or
                ``num_return_sequences`` as many copies of each, one behind the other.

        Raises:
            AdapterError: an adapter is not one of these layers, adapters cannot share a batch, or
                layers were replaced since :func:`adapted_linear`.
        """
        self._check()
        adapters = [adapters] if isinstance(adapters, str) else list(adapters)
        if not adapters:
            raise AdapterError(
                "adapters is empty: pass one Adapter or None for each row of the batch"
            )
        for adapter in adapters:
            if adapter is not None:
                self._check_adapter(adapter)
        return _Use(self, AdapterBank.pack(adapters, *self._placement()))

    def remove(self) -> None:
        """Leave the model as it was before :func:`adapted_linear`.

        Raises:
            AdapterError: a ``use`` block is open.
        """
        if self._scope is None:
            return
        if self._scope.open:
            raise AdapterError("a use() block is open: leave it before you remove the handle")
        for layer in self._layers:
            for key, hook in list(layer._forward_hooks.items()):
                if isinstance(hook, _Site) and hook.scope is self._scope:
                    del layer._forward_hooks[key]
        self._scope = None
        _forget_compiled()

    def _check(self) -> Scope:
        if self._scope is None:
            raise AdapterError("this handle was removed: call adapted_linear again")
        present = {id(module) for module in self.model.modules()}
        if not all(id(layer) in present for layer in self._layers):
            raise AdapterError(
                f"the model's {self._module} layers were replaced since adapted_linear: "
                "call it again"
            )
        return self._scope

    def _check_adapter(self, adapter: Adapter) -> None:
        if not isinstance(adapter, Adapter):
            raise AdapterError(f"adapters must be Adapter or None, got {type(adapter).__name__}")
        module = self._module
        if module not in adapter.A:
            raise AdapterError(
                f"the adapter is for {', '.join(sorted(adapter.A))}, this handle for {module}"
            )
        if adapter.num_layers != len(self._layers):
            raise AdapterError(
                f"the adapter has {adapter.num_layers} layers, this handle's {module} has "
                f"{len(self._layers)}"
            )
        a, b = adapter.A[module], adapter.B[module]
        if not (a.is_floating_point() and b.is_floating_point()):
            raise AdapterError(f"the adapter's {module} is {a.dtype}, which is not floating point")
        for index, layer in enumerate(self._layers):
            sizes = layer.in_features, layer.out_features
            if (a.shape[2], b.shape[2]) != sizes:
                raise AdapterError(
                    f"the adapter's {module} is {(a.shape[2], b.shape[2])}, the model's layer "
                    f"{index} is {sizes}"
                )

    def _placement(self) -> tuple[torch.device, torch.dtype]:
        """Where the factors go: with the layers' weights, in a dtype that can be multiplied."""
        tensors = [t for layer in self._layers for t in layer.parameters()]
        tensors += self.model.parameters()
        device = next((t.device for t in tensors if t.device.type != "meta"), "cpu")
        dtype = next((t.dtype for t in tensors if t.dtype in _COMPUTES), torch.float32)
        return torch.device(device), dtype


class _Use(contextlib.ContextDecorator):
    """What :meth:`AdaptedModel.use` returns; may be entered again, in itself too."""

    def __init__(self, handle: AdaptedModel, slots: AdapterBank | None) -> None:
        self._handle, self._slots = handle, slots

    def __enter__(self) -> nn.Module:
        self._handle._check().enter(self, self._slots, sys._getframe(1))
        return self._handle.model

    def __exit__(self, error: type[BaseException] | None, *_) -> None:
        if self._handle._scope is not None:
            self._handle._scope.leave(self)
            if error is None:
                # A layer that the block replaced ran without adapters.
                self._handle._check()


_COMPUTES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def adapted_linear(model: nn.Module, suffix: str) -> AdaptedModel:
    """Make any decoder accept a LoRA adapter for each example of a batch.

    Every ``nn.Linear`` whose name ends in ``.{layer}.{suffix}`` gets a forward hook that adds the
    update to its output, so subclasses, even quantized ones, keep their class, hooks and
    results. The adapters' module name is the last part of ``suffix``, e.g. "mlp.down_proj". A model
    may have several handles. Copies of the model (``copy.deepcopy``, pickle) run without adapters.

    Returns:
        A handle; ``with handle.use([adapter_a, None]): model(...)`` runs a batch of two.

    Raises:
        AdapterError: no layer matches, or several stacks of layers do, the numbering has gaps, or
            layers are not linear or share one module.
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(f"model must be an nn.Module, got {type(model).__name__}")
    pattern = re.compile(rf"(?:^|\.)(\d+)\.{re.escape(suffix)}$")
    stacks: dict[str, dict[int, nn.Module]] = {}
    others = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if _WRAPPERS & dict(module.named_children()).keys():
            continue
        name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        match = pattern.search(name)
        if match and _is_linear(module):
            stacks.setdefault(name[: match.start()], {})[int(match[1])] = module
        elif match:
            others.add(type(module).__name__)
    # One list of layers under two names is one stack.
    distinct = {tuple(map(id, s.values())): (name, s) for name, s in reversed(stacks.items())}
    stacks = dict(reversed(distinct.values()))
    if len(stacks) > 1:
        names = ", ".join(
            f"{name or 'the model itself'} (layers {_ranges(stack)})"
            for name, stack in list(stacks.items())[:4]
        )
        more = f" and {len(stacks) - 4} more" if len(stacks) > 4 else ""
        first = next(iter(stacks)).rpartition(".")[0]
        raise AdapterError(
            f"{len(stacks)} stacks of layers match *.<layer>.{suffix} in {type(model).__name__}: "
            f"{names}{more}; pass the submodule that holds the one you mean, as in "
            f"adapted_linear(model.get_submodule({first!r}), ...), or a longer suffix"
        )
    stack = next(iter(stacks.values()), {})
    if any(pattern.search(name) for name, _ in model.named_parameters()):
        others.add("plain parameters, as of fused experts")
    if not stack or sorted(stack) != list(range(len(stack))):
        reason = f"; modules of that name are {', '.join(sorted(others))}" if others else ""
        raise AdapterError(
            f"no complete stack of linear layers named *.<layer>.{suffix} in "
            f"{type(model).__name__}: found layers {sorted(stack)}{reason}"
        )
    layers = [stack[index] for index in range(len(stack))]
    if len({id(layer) for layer in layers}) < len(layers):
        raise AdapterError(
            f"layers of {type(model).__name__} share one {suffix} module, which cannot have an "
            "adapter for each of them"
        )
    return AdaptedModel(model, suffix.rpartition(".")[2], layers)


# Of torch.compile, FSDP and checkpoint_wrapper: no part of a layer's name.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is called for x Wᵀ (+ bias) or, as PEFT's, for that and something added."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        # nn.MultiheadAttention reads its weight and never calls it.
        return False
    return isinstance(getattr(module, "base_layer", module), nn.Linear)


def _ranges(stack: Mapping[int, nn.Module]) -> str:
    numbers = sorted(stack)
    whole = len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]} to {numbers[-1]}" if whole else ", ".join(map(str, numbers))


def _forget_compiled() -> None:
    """Drop compiled graphs: those compiled earlier do not check a module's hooks again."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
