"""LoRA adapters for each example of a batch in any PyTorch decoder.

:func:`adapted_linear` finds the decoder's linear layers and hooks them; the handle it returns
chooses the adapters. A :class:`Scope` decides which are in force where a layer runs. It holds a
value from the start to the end of a ``with`` block:

- in the thread of the block, in its asyncio tasks, in threads started inside the block and in
  tasks submitted to a ``ThreadPoolExecutor`` inside it, as with ``thread_inherit_context`` of
  Python 3.14. For this, ``Thread.start`` and ``ThreadPoolExecutor.submit`` are wrapped once;
- where activation checkpointing repeats a forward pass that ran inside the block, whenever and in
  whatever thread that is;
- in a generator that opened the block, but not in its caller between two of its items.

Where the value is not known, :meth:`Scope.current` raises instead of taking a guess.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import re
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import thread as executors
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType, MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from v2l_fast.errors import AdapterError
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.hypernet.adapter_bank import AdapterBank


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


# --- the adapters in force ------------------------------------------------------------------------


class _Unresolved:
    """In place of a value that a compiled graph cannot know; the call leaves the graph."""


UNRESOLVED = _Unresolved()
# Values for compiled graphs: Dynamo guards attributes of a threading.local, not a ContextVar.
LOCAL = threading.local()


@dataclass(frozen=True, eq=False)
class _Block:
    """An open block.

    Attributes:
        value: the value in force.
        owner: frame that opened it, when it is a generator's; the block then ends with the frame's
            turn, unless ``lent``.
        lent: a context manager or fixture opened the block for its caller.
        outer: the block in force where this one was opened, of a caller of its own.
        thread: the thread that opened it.
        opener: the object whose :meth:`Scope.leave` ends the block.
    """

    value: Any
    owner: FrameType | None = None
    lent: bool = False
    outer: _Block | None = None
    thread: threading.Thread = field(default_factory=threading.current_thread)
    opener: object = None


# Open blocks of every scope, in the order of their opening.
_BLOCKS: ContextVar[Mapping[Scope, tuple[_Block, ...]]] = ContextVar(
    "adapters in force", default=MappingProxyType({})
)
_STARTED_BY: weakref.WeakKeyDictionary[threading.Thread, weakref.ref[threading.Thread]] = (
    weakref.WeakKeyDictionary()
)
_NAMES = itertools.count()


class Scope:
    """A value that is in force from :meth:`enter` to :meth:`leave`.

    A copy (``copy.deepcopy``, pickle) is another scope, in which nothing is in force.
    """

    def __init__(self) -> None:
        _wrap_threads()
        self.name = f"scope_{next(_NAMES)}"
        self.used = False
        # Threads with open blocks, and how many each has.
        self.open: Counter[threading.Thread] = Counter()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return Scope, ()

    def enter(self, opener: object, value: Any, frame: FrameType) -> None:
        """``value`` is in force from here on.

        Args:
            opener: pass the same object to :meth:`leave`.
            frame: of the ``with`` statement.
        """
        block = self._block(value, frame, opener)
        self.used = True
        self._count(block.thread, 1)
        _set(self, (*_blocks(self), block))

    def leave(self, opener: object) -> None:
        """End the latest block of ``opener``, whether or not others were opened after it."""
        block = next((b for b in reversed(_blocks(self)) if b.opener is opener), None)
        if block is not None:
            self._count(block.thread, -1)
            _set(self, tuple(b for b in _blocks(self) if b is not block))

    def current(self) -> Any:
        """The value in force here, or None.

        Raises:
            AdapterError: it is not known which one is.
        """
        repeating = False
        regions: list[Any] = []
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward or (_blocks(self) and not torch.is_inference_mode_enabled()):
            repeating, regions = _checkpoints()
        if repeating:
            value = _recorded(regions.pop(), self)
        else:
            value = self._by_block()
            if in_backward and self.used and not _blocks(self):
                raise AdapterError(
                    "a backward pass runs the model again, and it is not known with which "
                    "adapters: call backward() inside the block of use() in which the forward "
                    "pass ran, or in use([None, ...]) if it ran without adapters"
                )
        for region in regions:
            _record(region, self, value)
        return value

    def local(self) -> Any:
        """As :meth:`current` inside a compiled graph; UNRESOLVED when that must be left."""
        return getattr(LOCAL, self.name, None)

    def _by_block(self) -> Any:
        blocks = _blocks(self)
        if not blocks:
            self._check_thread()
            return None
        block = _in_force(blocks, sys._getframe(1))
        if block is None:
            raise AdapterError(
                "a suspended generator holds a use() block open around the code that runs the "
                "model now: let it end first, or enter use() where the model runs "
                "(use([None, ...]) for no adapters)"
            )
        return block.value

    def _check_thread(self) -> None:
        if not self.open:
            return
        thread = threading.current_thread()
        known = thread is threading.main_thread() or _is_executors(thread)
        if known or self.open[thread]:
            return
        starter = _STARTED_BY[thread]() if thread in _STARTED_BY else thread
        if starter is thread or (starter is not None and self.open[starter]):
            raise AdapterError(
                "the model runs in a thread that was started before use() was entered in another "
                "one: enter use() in this thread too (use([None, ...]) for no adapters)"
            )

    def _block(self, value: Any, frame: FrameType, opener: object) -> _Block:
        while _module(frame) == "contextlib" and frame.f_back is not None:
            frame = frame.f_back
        lent = _flags(frame) & _GENERATES != 0 and _is_lent(frame)
        outer = _on_stack(_blocks(self), frame)
        return _Block(value, frame, lent, outer, opener=opener)

    def _count(self, thread: threading.Thread, change: int) -> None:
        with self._lock:
            self.open[thread] += change
            self.open = +self.open


def _blocks(scope: Scope) -> tuple[_Block, ...]:
    return _BLOCKS.get().get(scope, ())


def _set(scope: Scope, blocks: tuple[_Block, ...]) -> None:
    others = {s: b for s, b in _BLOCKS.get().items() if s is not scope}
    _BLOCKS.set(MappingProxyType({**others, scope: blocks} if blocks else others))
    _set_local(scope, blocks)


def _set_local(scope: Scope, blocks: tuple[_Block, ...]) -> None:
    if not blocks:
        # Where another task of this thread may hold a block, graphs are left.
        if scope.open[threading.current_thread()]:
            setattr(LOCAL, scope.name, UNRESOLVED)
        elif hasattr(LOCAL, scope.name):
            delattr(LOCAL, scope.name)
        return
    simple = not any(_flags(block.owner) & (_GENERATES | inspect.CO_COROUTINE) for block in blocks)
    setattr(LOCAL, scope.name, blocks[-1].value if simple else UNRESOLVED)


_GENERATES = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


def _flags(frame: FrameType | None) -> int:
    return 0 if frame is None else frame.f_code.co_flags


def _module(frame: FrameType | None) -> str:
    return "" if frame is None else frame.f_globals.get("__name__", "")


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _on_stack(blocks: tuple[_Block, ...], frame: FrameType | None) -> _Block | None:
    """The latest block of the innermost frame that has one."""
    owners = {block.owner: block for block in blocks if block.owner is not None}
    return next((owners[f] for f in _frames(frame) if f in owners), None) if owners else None


def _in_force(blocks: tuple[_Block, ...], frame: FrameType) -> _Block | None:
    """Which of the open blocks surrounds a frame; None when a generator's might or might not."""
    latest = blocks[-1]
    if not any(_flags(block.owner) & _GENERATES for block in blocks):
        return latest
    nearest = _on_stack(blocks, frame)
    if nearest is None:
        return None if _flags(latest.owner) & _GENERATES and not latest.lent else latest
    inner: _Block | None = latest
    while inner is not None and inner is not nearest:
        inner = inner.outer
    # Opened inside of the nearest one, by a context manager; else by another generator.
    return latest if inner is nearest else nearest


_LENDERS = ("contextlib", "_pytest", "pytest_asyncio", "anyio")


def _is_lent(frame: FrameType) -> bool:
    """Whether a generator is the body of a context manager or a pytest fixture."""
    return _module(frame.f_back).partition(".")[0] in _LENDERS


# --- threads -----------------------------------------------------------------------------------


def _snapshot() -> dict[Scope, _Block]:
    """The values in force here, as blocks for another thread."""
    blocks = {s: _in_force(b, sys._getframe(1)) for s, b in _BLOCKS.get().items()}
    return {s: _Block(b.value) for s, b in blocks.items() if b is not None}


def _run_within(inherited: dict[Scope, _Block], function: Callable, *args, **kwargs) -> Any:
    """Run a function with another thread's snapshot in force."""
    token = _BLOCKS.set(MappingProxyType({s: (b,) for s, b in inherited.items()}))
    for scope, block in inherited.items():
        _set_local(scope, (block,))
    try:
        return function(*args, **kwargs)
    finally:
        _BLOCKS.reset(token)
        for scope in inherited:
            _set_local(scope, _blocks(scope))


def _is_executors(thread: threading.Thread) -> bool:
    """Whether a thread serves a ThreadPoolExecutor, whose tasks bring their own snapshot."""
    return getattr(thread, "_target", None) is executors._worker


@functools.cache
def _wrap_threads() -> None:
    start: Callable = threading.Thread.start
    submit: Callable = ThreadPoolExecutor.submit

    @functools.wraps(start)
    def starting(self: threading.Thread) -> None:
        if not _is_executors(self):
            _STARTED_BY[self] = weakref.ref(threading.current_thread())
            if inherited := _snapshot():
                vars(self)["run"] = functools.partial(_run_within, inherited, self.run)
        start(self)

    @functools.wraps(submit)
    def submitting(self: ThreadPoolExecutor, fn: Callable, /, *args, **kwargs):
        if inherited := _snapshot():
            return submit(self, _run_within, inherited, fn, *args, **kwargs)
        return submit(self, fn, *args, **kwargs)

    threading.Thread.start = starting  # type: ignore[method-assign]
    ThreadPoolExecutor.submit = submitting  # type: ignore[method-assign, assignment]


# --- activation checkpointing ------------------------------------------------------------------


def _non_reentrant(names: Mapping[str, Any]) -> Any:
    """The region of a frame that waits for the forward pass with use_reentrant=False."""
    return names["gen"].gi_frame.f_locals.get("new_frame") if names.get("gen") else None


# Each checkpointed region is an object of PyTorch's that lives as long as its graph; both the
# forward pass and its repetition have it in a frame of torch.utils.checkpoint.
_FORWARD = {
    "forward": lambda names: names.get("ctx"),
    "checkpoint": _non_reentrant,
    "_checkpoint_impl": _non_reentrant,  # from torch 2.15 on
}
_REPEATED = {
    "backward": lambda names: names.get("ctx"),
    "unpack_hook": lambda names: names.get("frame"),
}
_FIELD = "v2l_adapters_in_force"


def _checkpoints() -> tuple[bool, list[Any]]:
    """The checkpointed regions around here, inner ones first.

    Returns:
        Whether the outermost of them is being repeated, and the regions up to that one.
    """
    regions: list[Any] = []
    for frame in _frames(sys._getframe(1)):
        if frame.f_code.co_filename != checkpoint.__file__:
            continue
        name = frame.f_code.co_name
        if name in _REPEATED and (region := _REPEATED[name](frame.f_locals)) is not None:
            return True, [*regions, region]
        if name in _FORWARD and (region := _FORWARD[name](frame.f_locals)) is not None:
            regions.append(region)
    return False, regions


def _record(region: Any, scope: Scope, value: Any) -> None:
    if value is not None or hasattr(region, _FIELD):
        setattr(region, _FIELD, {**getattr(region, _FIELD, {}), scope: value})


def _recorded(region: Any, scope: Scope) -> Any:
    return getattr(region, _FIELD, {}).get(scope)
