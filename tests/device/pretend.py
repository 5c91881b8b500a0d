"""A pretend CUDA device: tensors that say they are on cuda:0 and hold CPU data.

The product runs on it unchanged. What a real device would do, it records or refuses:

- an op over tensors of two devices raises, as CUDA does;
- a point where the host waits for the device is an event of :attr:`PretendDevice.waits`;
- a wait, an allocation of pinned memory or a first compilation inside of a graph capture is a
  problem, and so is a capture into a memory pool whose graphs are all gone;
- a replay that reads a tensor from outside of its capture that was freed since is a problem;
- the output of one of our ops that differs in shape, dtype or strides from what its fake
  implementation tells the compiler is a problem.

Kernels are not run: an op computes by its reference, whatever ``dispatch`` chose, which is counted.
Nothing here measures time, and what depends on the order of streams is not seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from csrc_triton import dispatch

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
make_tensor, as_tensor = torch.tensor, torch.as_tensor
OURS = ("/v2l_fast/", "/csrc_triton/", "/bench/")
# Ops of ours, by name: run as they are, and compared with what they tell the compiler.
NAMESPACES = ("v2l::", "v2l_fast::")
# Ops whose result the host needs before it can go on.
WAITS = {
    "aten::_local_scalar_dense": "item",
    "aten::item": "item",
    "aten::is_nonzero": "bool",
    "aten::equal": "equal",
    "aten::nonzero": "nonzero",
    "aten::masked_select": "masked_select",
    "aten::_unique2": "unique",
    "aten::unique_dim": "unique",
    "aten::unique_consecutive": "unique",
    "aten::bincount": "bincount",
    "aten::repeat_interleave.Tensor": "repeat_interleave",
}
COPIES = ("aten::_to_copy", "aten::to")
INDEXING = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")
UNINITIALIZED = (
    "aten::empty.memory_format", "aten::empty_like", "aten::new_empty", "aten::empty_strided",
    "aten::new_empty_strided",
)  # fmt: skip


class PretendDevice:
    """What happened on the device.

    Attributes:
        capability, name: of the card.
        waits: (kind, place in our code) of every wait for the device, in order.
        problems: what would fail or be wrong on a real device.
        kernels: calls of each op that ``dispatch`` gave to the Triton kernels.
        captures, replays: number of graphs captured, and of their replays.
    """

    def __init__(self, capability: tuple[int, int], name: str) -> None:
        self.capability, self.name = capability, name
        self.waits: list[tuple[str, str]] = []
        self.problems: list[str] = []
        self.kernels: Counter[str] = Counter()
        self.captures = self.replays = 0
        self.graph: PretendGraph | None = None
        self.capturing_thread: int | None = None
        self.pools: Counter[int] = Counter()
        self._pinned: dict[int, StorageWeakRef] = {}

    @property
    def is_capturing(self) -> bool:
        return self.graph is not None and threading.get_ident() == self.capturing_thread

    def wait(self, kind: str) -> None:
        """The host waits for the device."""
        self.waits.append((kind, _place()))
        if self.is_capturing:
            self.problem(f"{kind} in a graph capture")

    def problem(self, text: str) -> None:
        self.problems.append(f"{text} at {_place(4)}")

    @contextlib.contextmanager
    def watch(self) -> Iterator[list[tuple[str, str]]]:
        """The waits inside of the block."""
        before, inside = len(self.waits), []
        yield inside
        inside += self.waits[before:]

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Remember that a tensor's memory is page-locked."""
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = StorageWeakRef(storage)
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        if isinstance(tensor, CudaTensor):
            return False
        known = self._pinned.get(tensor.untyped_storage()._cdata)
        return known is not None and not known.expired()


_device: PretendDevice | None = None


def _active() -> PretendDevice:
    assert _device is not None, "a CUDA tensor outlived its pretend device"
    return _device


def _place(depth: int = 2) -> str:
    """The innermost lines of our code on the stack."""
    places: list[str] = []
    frame = sys._getframe(2)
    while frame is not None and len(places) < depth:
        name = frame.f_code.co_filename
        if any(part in name for part in OURS) and "site-packages" not in name:
            root = max(name.find(part) for part in OURS)
            places.append(f"{name[root + 1 :]}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(places) or "a test"


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """An op's arguments or results with a function applied; PyTorch's own takes twice as long as
    the rest of an op."""
    if isinstance(value, tuple | list):
        return type(value)([_mapped(function, item) for item in value])
    if isinstance(value, dict):
        return {key: _mapped(function, item) for key, item in value.items()}
    return function(value)


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of an op's arguments or results, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, tuple | list):
        return []
    return [tensor for item in value for tensor in _tensors(item)]


@functools.cache
def _is_composite(func: Any) -> bool:
    """Whether PyTorch defines the op by others."""
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    )
    return composite and func._schema.name != "aten::is_pinned"


# --- tensors --------------------------------------------------------------------------------------


def _indices(index: Any) -> Any:
    """An index whose lists of numbers are tensors on the host.

    PyTorch makes the tensor on the device of the indexed one, which it takes for "meta", where a
    tensor has no values.
    """
    if isinstance(index, tuple):
        return tuple(_index_tensor(item) for item in index)
    if isinstance(index, Sequence) and not all(isinstance(item, int) for item in index):
        return [_index_tensor(item) for item in index]
    return _index_tensor(index)


def _index_tensor(item: Any) -> Any:
    if not isinstance(item, Sequence):
        return item
    values = make_tensor(item, device=CPU)
    return values if values.dtype in (torch.bool, torch.uint8) else values.long()


def _host_values(data: Any) -> Any:
    """Nested lists whose device tensors are copied to the host; anything else as it is."""
    if not isinstance(data, list | tuple):
        return data
    return [t.cpu() if isinstance(t, CudaTensor) else _host_values(t) for t in data]


class CudaTensor(torch.Tensor):
    """CPU data of a tensor that says it is on cuda:0."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> CudaTensor:
        outer = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device="meta", requires_grad=False,
        )  # fmt: skip
        outer.inner = inner
        return outer

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_meta(self) -> bool:
        return False

    @property
    def is_cpu(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"CudaTensor({tuple(self.shape)}, {self.dtype})"

    def get_device(self) -> int:
        return 0

    def __getitem__(self, index: Any) -> torch.Tensor:
        return super().__getitem__(_indices(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_indices(index), value)

    def new_tensor(self, data: Any, *, dtype=None, device=None, **options: Any) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or CUDA, **options)

    def tolist(self) -> Any:
        _active().wait("tolist")
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            copy: torch.Tensor = CudaTensor(self.inner.clone())
            if isinstance(self, torch.nn.Parameter):
                copy = torch.nn.Parameter(copy, requires_grad=self.requires_grad)
            memo[id(self)] = copy
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with CudaMode():
            return func(*args, **(kwargs or {}))


class CudaMode(TorchDispatchMode):
    """Runs every op; new tensors of device "cuda" become :class:`CudaTensor`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func._schema.name
        if name.startswith(NAMESPACES):
            return self._run_own(name, args, kwargs)
        if _is_composite(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return _run(func, name, args, kwargs)

    def _run_own(self, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        definition = torch._library.custom_ops.OPDEFS[name]
        with self:
            result = definition._init_fn(*args, **kwargs)
        with _disable_current_modes(), torch.no_grad():
            meta = _mapped(_as_meta, (args, kwargs))
            expected = definition._abstract_fn(*meta[0], **meta[1])
        pairs = zip(_tensors(expected), _tensors(result), strict=True)
        for index, (fake, real) in enumerate(pairs):
            strides = zip(real.shape, fake.stride(), real.stride(), strict=True)
            same = all(a == b for size, a, b in strides if size > 1)
            if fake.shape != real.shape or fake.dtype != real.dtype or not same:
                _active().problem(
                    f"{name} output {index} is {_layout(real)}, its fake {_layout(fake)}"
                )
        return result


def _as_meta(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _layout(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.stride()} {tensor.dtype}"


def _is_cuda(device: Any) -> bool:
    kind = None if device is None else torch.device(device).type
    # A wrapper is a meta tensor to C++, which asks for "meta" where it makes one like it; whoever
    # wants real meta tensors says so by ``with torch.device("meta")``.
    return kind == "cuda" or (kind == "meta" and torch.get_default_device().type != "meta")


def _run(func: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    tensors = _tensors((args, kwargs))
    ours = [t for t in tensors if isinstance(t, CudaTensor)]
    target = kwargs.get("device")
    if not ours and not _is_cuda(target):
        pins = kwargs.pop("pin_memory", None)
        result = func(*args, **kwargs)
        return _active().pin(result) if pins else result
    _check_crossing(name, args, kwargs, tensors, ours)
    overload = func.name()
    kind = WAITS.get(overload.removesuffix(".default")) or WAITS.get(name)
    if kind:
        _active().wait(kind)
    if name in INDEXING and any(
        isinstance(t, torch.Tensor) and t.dtype in (torch.bool, torch.uint8) for t in args[1]
    ):
        _active().wait("boolean index")
    plain_args, plain_kwargs = _mapped(_unwrapped, (args, kwargs))
    plain_kwargs.pop("pin_memory", None)
    result = func(*plain_args, **plain_kwargs)
    if not _tensors(result):
        return result
    if overload.removesuffix(".default") in UNINITIALIZED and result.is_floating_point():
        result.fill_(float("nan"))
    if target is not None and not _is_cuda(target):
        return result
    if name == "aten::copy_" and not isinstance(args[0], CudaTensor):
        return args[0]
    device = _active()
    if device.is_capturing:
        assert device.graph is not None
        device.graph.record(func, plain_args, plain_kwargs, result)
    return _outputs(func, name, args, kwargs, result, ours)


def _check_crossing(
    name: str, args: tuple, kwargs: dict[str, Any], tensors: list, ours: list
) -> None:
    """Record what a copy between devices waits for; refuse tensors of two devices."""
    device, target = _active(), kwargs.get("device")
    if name in COPIES or name == "aten::copy_":
        if name == "aten::copy_":
            source, to_device = args[1], isinstance(args[0], CudaTensor)
            quick = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        else:
            source, to_device = args[0], target is None or _is_cuda(target)
            quick = kwargs.get("non_blocking", False)
        from_device = isinstance(source, CudaTensor)
        if from_device and not to_device and not (quick and name == "aten::copy_"):
            device.wait("copy to the host")
        elif to_device and not from_device and not (quick and device.is_pinned(source)):
            # A number of the host becomes an argument of a kernel.
            if not (name == "aten::copy_" and source.dim() == 0):
                device.wait("copy from pageable memory")
        return
    strangers = [t for t in tensors if not isinstance(t, CudaTensor) and t.dim() > 0]
    if name in INDEXING and isinstance(args[0], CudaTensor):
        indices = [t for t in args[1] if any(t is stranger for stranger in strangers)]
        if indices:
            device.wait("index from pageable memory")
            strangers = [t for t in strangers if not any(t is index for index in indices)]
    if ours and strangers:
        text = f"{name} of {tuple(strangers[0].shape)} on cpu and a tensor on cuda:0"
        device.problem(text)
        raise RuntimeError(f"expected all tensors to be on the same device: {text}")


def _unwrapped(value: Any) -> Any:
    if isinstance(value, CudaTensor):
        return value.inner
    if isinstance(value, torch.device) and value.type in ("cuda", "meta"):
        return CPU
    return value


def _wrapped(value: Any) -> Any:
    plain = isinstance(value, torch.Tensor) and not isinstance(value, CudaTensor)
    return CudaTensor(value) if plain else value


def _outputs(func: Any, name: str, args: tuple, kwargs: dict, result: Any, ours: list) -> Any:
    """The result on the device; what an op wrote in place is the tensor that it was given."""
    schema = func._schema
    views = any(r.alias_info for r in schema.returns)
    if views and torch.is_inference_mode_enabled() and ours and not ours[0].is_inference():
        with torch.inference_mode(False):
            wrapped = _mapped(_wrapped, result)
    else:
        wrapped = _mapped(_wrapped, result)
    if name in COPIES or not ours:
        return wrapped
    in_place = schema.returns and schema.returns[0].alias_info
    if in_place and in_place.is_write:
        written = [
            args[i] if i < len(args) else kwargs[argument.name]
            for i, argument in enumerate(schema.arguments)
            if argument.alias_info and argument.alias_info.is_write
        ]
        return written[0] if len(schema.returns) == 1 else tuple(written)
    return wrapped


# --- graphs ---------------------------------------------------------------------------------------


class _Outside:
    """A tensor from outside of a capture, held weakly, as a graph holds its address."""

    def __init__(self, tensor: torch.Tensor, place: str) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.layout = tensor.storage_offset(), tensor.size(), tensor.stride()
        self.dtype, self.place = tensor.dtype, place

    def tensor(self) -> torch.Tensor:
        storage = None
        if not self.storage.expired():
            storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            text = f"a replay reads {tuple(self.layout[1])}, freed since, of {self.place}"
            _active().problem(text)
            raise RuntimeError(text)
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.layout)


class PretendGraph:
    """``torch.cuda.CUDAGraph``: the ops of a capture, run again by :meth:`replay`."""

    def __init__(self, *_: object, **__: object) -> None:
        self._ops: list[tuple] = []
        self._made: set[int] = set()
        self._pool: int | None = None

    def __del__(self) -> None:
        if _device is not None and self._pool is not None:
            _device.pools[self._pool] -= 1

    def begin(self, pool: tuple[int, int] | None) -> None:
        device = _active()
        if pool is not None and device.pools[pool[1]] < 1:
            device.problem("a capture into a memory pool whose graphs are all gone")
        self._pool = id(self) if pool is None else pool[1]
        device.pools[self._pool] += 1
        device.captures += 1

    def record(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        place = _place()

        def held(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or _storage(value) in self._made:
                return value
            return _Outside(value, place)

        inputs = _mapped(held, (args, kwargs))
        outputs = _tensors(result)
        known = {_storage(t) for t in _tensors((args, kwargs))}
        self._made |= {_storage(t) for t in outputs if _storage(t) not in known}
        kept = [t if _storage(t) in self._made else None for t in outputs]
        self._ops.append((func, inputs, kept))

    def replay(self) -> None:
        _active().replays += 1
        with _disable_current_modes():
            for func, inputs, kept in self._ops:
                args, kwargs = _mapped(
                    lambda v: v.tensor() if isinstance(v, _Outside) else v, inputs
                )
                for new, old in zip(_tensors(func(*args, **kwargs)), kept, strict=True):
                    if old is not None and new.data_ptr() != old.data_ptr():
                        old.copy_(new)

    def pool(self) -> tuple[int, int]:
        assert self._pool is not None
        return 0, self._pool

    def reset(self) -> None:
        self._ops.clear()


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Capture:
    """``torch.cuda.graph``."""

    def __init__(self, graph: PretendGraph, pool=None, stream=None, **_: object) -> None:
        self.graph, self.pool = graph, pool

    def __enter__(self) -> None:
        device = _active()
        self.graph.begin(self.pool)
        device.graph, device.capturing_thread = self.graph, threading.get_ident()

    def __exit__(self, *_: object) -> None:
        _active().graph = None


# --- the device -----------------------------------------------------------------------------------


class _Stream:
    cuda_stream = device_index = 0
    device = CUDA

    def __init__(self, *_: object, **__: object) -> None: ...

    def wait_stream(self, _: object) -> None: ...

    def wait_event(self, _: object) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def synchronize(self) -> None:
        _active().wait("stream.synchronize")


class _Event:
    def __init__(self, *_: object, **__: object) -> None: ...

    def record(self, *_: object) -> None: ...

    def wait(self, *_: object) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: object) -> float:
        return 1.0

    def synchronize(self) -> None:
        _active().wait("event.synchronize")


@contextlib.contextmanager
def _nothing(*_: object, **__: object) -> Iterator[None]:
    yield


def _cuda_functions(device: PretendDevice) -> dict[str, Any]:
    """What ``torch.cuda`` answers."""
    major, minor = device.capability
    properties = SimpleNamespace(
        name=device.name, major=major, minor=minor, multi_processor_count=132,
        total_memory=80 << 30, warp_size=32, max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536, shared_memory_per_block_optin=232448,
        L2_cache_size=50 << 20, gcnArchName="",
    )  # fmt: skip
    return {
        "is_available": lambda: True, "is_initialized": lambda: True, "device_count": lambda: 1,
        "current_device": lambda: 0, "set_device": lambda _: None, "_lazy_init": lambda: None,
        "get_device_capability": lambda _=None: device.capability,
        "get_device_name": lambda _=None: device.name,
        "get_device_properties": lambda _=None: properties,
        "is_bf16_supported": lambda *_: True,
        "synchronize": lambda _=None: device.wait("torch.cuda.synchronize"),
        "is_current_stream_capturing": lambda: device.is_capturing,
        "Stream": _Stream, "Event": _Event, "CUDAGraph": PretendGraph, "graph": _Capture,
        "stream": _nothing, "device": _nothing, "device_of": _nothing,
        "current_stream": lambda _=None: _Stream(), "default_stream": lambda _=None: _Stream(),
        "manual_seed": lambda _: None, "manual_seed_all": lambda _: None,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "empty_cache": lambda: None, "mem_get_info": lambda _=None: (70 << 30, 80 << 30),
        "memory_allocated": lambda _=None: 0, "max_memory_allocated": lambda _=None: 0,
        "memory_reserved": lambda _=None: 0, "max_memory_reserved": lambda _=None: 0,
        "reset_peak_memory_stats": lambda _=None: None,
    }  # fmt: skip


@contextlib.contextmanager
def cuda(
    capability: tuple[int, int] = (9, 0), name: str = "NVIDIA H100 80GB HBM3"
) -> Iterator[PretendDevice]:
    """Make ``torch.cuda`` this device inside of the block, in every thread started there."""
    global _device
    device = _device = PretendDevice(capability, name)
    run_thread = threading.Thread.run
    uses_kernels, count_wrong = dispatch.Op._uses_kernels, dispatch.Op.wrong_elements

    def run_in_mode(thread: threading.Thread) -> None:
        torch._C._set_only_lift_cpu_tensors(True)
        with CudaMode():
            run_thread(thread)

    def pin(tensor: torch.Tensor, *_: object) -> torch.Tensor:
        if isinstance(tensor, CudaTensor):
            raise RuntimeError("cannot pin 'torch.cuda' only dense CPU tensors can be pinned")
        if device.is_capturing:
            device.problem("an allocation of pinned memory in a graph capture")
        with _disable_current_modes():
            return device.pin(tensor.clone())

    def tensor(data: Any, *, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        made = make_tensor(_host_values(data), **kwargs)
        return pin(made) if pin_memory else made

    def implementation(op: dispatch.Op, *tensors: torch.Tensor | None, **shape: Any) -> Any:
        device.kernels[op.name] += uses_kernels(op, tensors, shape)
        return op.reference

    def wrong_elements(op, check, dtype, gpu, small=False) -> int:
        by_reference = dataclasses.replace(op, load_kernels=lambda: op.reference)
        return count_wrong(by_reference, check, torch.float32, gpu, small=True)

    with contextlib.ExitStack() as stack:
        for key, value in _cuda_functions(device).items():
            stack.enter_context(mock.patch.object(torch.cuda, key, value, create=True))
        for owner, key, value in (
            (torch, "tensor", tensor),
            (torch, "as_tensor", lambda data, *a, **k: as_tensor(_host_values(data), *a, **k)),
            (torch.Tensor, "pin_memory", pin),
            (torch.Tensor, "is_pinned", lambda tensor, *_: device.is_pinned(tensor)),
            (threading.Thread, "run", run_in_mode),
            (dispatch.Op, "implementation", implementation),
            (dispatch.Op, "wrong_elements", wrong_elements),
            (dispatch, "_has_triton", lambda: True),
            (dispatch, "_verdicts", {}),
        ):
            stack.enter_context(mock.patch.object(owner, key, value))
        overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        torch._C._set_only_lift_cpu_tensors(True)
        torch._C._ensureCUDADeviceGuardSet()
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(CudaMode())
        yield device
