"""Reads pickles without executing what they name.

A pickle is a program for a stack machine. This interpreter knows the instructions that
``torch.save`` emits and a closed table of names; a name becomes data (:class:`Record`,
:class:`StorageRef`, :class:`TensorRef`) and nothing in the file is imported, called or assigned to.
Bytes of tensors are read by ``torch_archive``; what the records mean is known to ``frames2lora``.

Why not ``torch.load(weights_only=True)``: its table of callables cannot be narrowed. The names it
always allows (``torch.Tensor``, ``bytearray``, storages sized by the file's own claim) let a small
file ask for any amount of memory, a tensor of stride 0 passes, allowed classes are process-wide
state, and it cannot tell tensors apart before their bytes are in memory. ``pickle.Unpickler`` with
a ``find_class`` of its own allocates by the file's claims too (memo indices, byte counts).
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch

from v2l_fast.errors import CheckpointError

# A checkpoint of 32 layers needs 10 thousand steps; the bounds keep a hostile file under a few
# seconds and a few hundred megabytes.
MAX_STEPS = 500_000
MAX_PICKLE_BYTES = 8 << 20
MAX_DIMS = 8


@dataclass(frozen=True)
class StorageRef:
    """A storage the file claims to hold: ``numel`` elements of ``dtype`` under ``key``."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class TensorRef:
    """A tensor as a view of a storage, inside its bounds and of no more elements than it holds."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass
class Record:
    """An object of a known class, as its fields."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Name:
    """A known name that has not been called."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class _Mark:
    """Start of a run of stack items."""


RECORDS = frozenset(
    {
        "ctx_to_lora.modeling.hypernet.HypernetConfig",
        "ctx_to_lora.modeling.aggregator.AggregatorConfig",
        "ctx_to_lora.configs.CtxEncoderArguments",
        "peft.tuners.lora.config.LoraConfig",
        "peft.tuners.lora.config.LoraRuntimeConfig",
    }
)
# Their members become the plain values they are defined by.
ENUMS = frozenset(
    {
        "ctx_to_lora.modeling.aggregator.AGGREGATOR_TYPE",
        "ctx_to_lora.modeling.ctx_encoder.CTX_ENCODER_TYPE",
        "ctx_to_lora.pooling.POOL_FN",
        "peft.utils.peft_types.PeftType",
        "peft.utils.peft_types.TaskType",
    }
)
STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
DTYPES = frozenset(str(dtype) for dtype in STORAGES.values())
CONTAINERS: dict[str, Callable[[Iterable], Any]] = {
    "builtins.dict": dict,
    "builtins.frozenset": frozenset,
    "builtins.list": list,
    "builtins.set": set,
    "builtins.tuple": tuple,
    "collections.OrderedDict": dict,
    "torch.Size": tuple,
}
FUNCTIONS = frozenset(
    {
        "builtins.range",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch.device",
    }
)
# Protocol 2 writes the names that Python 2 had.
PYTHON2_NAMES = {
    ("__builtin__", name): ("builtins", name)
    for name in ("dict", "frozenset", "list", "set", "tuple")
} | {("__builtin__", "xrange"): ("builtins", "range")}
KNOWN = RECORDS | ENUMS | FUNCTIONS | DTYPES | STORAGES.keys() | CONTAINERS.keys()

CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
    "MARK": _Mark,
}
NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"}
TEXTS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"}
LITERALS = NUMBERS | TEXTS | {"BINBYTES", "SHORT_BINBYTES"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def quote(value: object, limit: int = 120) -> str:
    """A value of a file as one short printable line, whatever the file says."""
    if isinstance(value, int) and value.bit_length() > 64:
        return "an integer of more than 64 bits"
    if not isinstance(value, (str, bytes, int, float, type(None))):
        return f"a {type(value).__name__.strip('_').lower()}"
    text = ascii(value[:limit] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def read_pickle(stream: BinaryIO, source: object) -> tuple[Any, dict[str, StorageRef]]:
    """One pickle from a stream of bounded size, as inert data, and the storages it names.

    The stream is left after the pickle's last byte.

    Raises:
        CheckpointError: naming ``source``: an unknown name or instruction, a tensor outside its
            storage, a corrupt pickle, or one beyond ``MAX_STEPS``.
    """
    machine = _Machine(source)
    try:
        with warnings.catch_warnings():
            # What the standard library says of odd text in a hostile file is nobody's concern.
            warnings.simplefilter("ignore")
            return machine.run(stream), machine.storages
    except CheckpointError:
        raise
    except (IndexError, KeyError, ValueError, TypeError, OverflowError):
        raise CheckpointError(
            f"{source}: corrupt or truncated pickle; get the file again"
        ) from None


class _Machine:
    """The stack machine of one pickle."""

    def __init__(self, source: object) -> None:
        self.source = source
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, StorageRef] = {}
        self.steps = 0

    def run(self, stream: BinaryIO) -> Any:
        for opcode, argument, _ in pickletools.genops(stream):
            self.charge(1)
            if opcode.name == "STOP":
                break
            self.step(opcode.name, argument)
        (result,) = self.stack
        return result

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        if opcode in LITERALS:
            stack.append(argument)
        elif opcode in CONSTANTS:
            stack.append(CONSTANTS[opcode]())
        elif opcode in TUPLES:
            stack[-TUPLES[opcode] :] = [tuple(self.top(TUPLES[opcode]))]
        elif opcode in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif opcode == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif opcode == "GLOBAL":
            # genops joins the two lines with a space; a module's name holds none.
            stack.append(self.resolve(*argument.split(" ", 1)))
        elif opcode == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(self.resolve(module, name))
        elif opcode in ("REDUCE", "NEWOBJ"):
            arguments, target = stack.pop(), stack.pop()
            stack.append(self.call(target, arguments))
        elif opcode == "BUILD":
            state = stack.pop()
            self.build(stack[-1], state)
        elif opcode == "BINPERSID":
            stack.append(self.storage(stack.pop()))
        elif opcode in ("TUPLE", "FROZENSET"):
            items = self.to_mark()
            stack.append(tuple(items) if opcode == "TUPLE" else frozenset(self.scalars(items)))
        elif opcode in ("APPEND", "APPENDS"):
            items = [stack.pop()] if opcode == "APPEND" else self.to_mark()
            self.target(list, opcode).extend(items)
        elif opcode == "ADDITEMS":
            items = self.to_mark()
            self.target(set, opcode).update(self.scalars(items))
        elif opcode in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if opcode == "SETITEM" else self.to_mark()
            keys = self.scalars(items[::2])
            self.target(dict, opcode).update(zip(keys, items[1::2], strict=True))
        elif opcode not in ("PROTO", "FRAME"):
            self.refuse(f"it uses the pickle instruction {opcode}, which torch.save does not write")

    # --- stack --------------------------------------------------------------------------------

    def charge(self, steps: int) -> None:
        """Count work, so that copies of large memoized values cannot add up."""
        self.steps += steps
        if self.steps > MAX_STEPS:
            self.refuse(f"it needs more than {MAX_STEPS} steps to read, too many for a checkpoint")

    def refuse(self, what: str) -> None:
        raise CheckpointError(
            f"{self.source}: refused, {what}; nothing was executed, do not use this file"
        )

    def top(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("stack underflow")
        return self.stack[-count:]

    def to_mark(self) -> list[Any]:
        items: list[Any] = []
        while not isinstance(item := self.stack.pop(), _Mark):
            items.append(item)
        return items[::-1]

    def target(self, kind: type, opcode: str) -> Any:
        if type(self.stack[-1]) is not kind:
            self.refuse(f"it applies {opcode} to {quote(self.stack[-1])}")
        return self.stack[-1]

    def scalars(self, items: Iterable) -> list[Any]:
        """Keys and set members: hashing nested tuples can take exponential time."""
        items = list(items)
        for item in items:
            if not isinstance(item, (str, bytes, int, float, type(None))):
                self.refuse(f"it uses {quote(item)} as a key")
        return items

    # --- names --------------------------------------------------------------------------------

    def resolve(self, module: Any, name: Any) -> _Name:
        if not isinstance(module, str) or not isinstance(name, str):
            self.refuse(f"it names {quote(name)} in {quote(module)}")
        known = _Name(*PYTHON2_NAMES.get((module, name), (module, name)))
        if str(known) not in KNOWN:
            self.refuse(f"it names {quote(f'{module}.{name}')}, which no released checkpoint does")
        return known

    def call(self, target: Any, arguments: Any) -> Any:
        """What calling a known name stands for, as data."""
        if not isinstance(target, _Name) or not isinstance(arguments, tuple):
            self.refuse(f"it calls {quote(target)}")
        name = str(target)
        if name in RECORDS and not arguments:
            return Record(name)
        if name in ENUMS and len(arguments) == 1 and isinstance(arguments[0], (str, int)):
            return arguments[0]
        if name in CONTAINERS and len(arguments) <= 1:
            return self.container(CONTAINERS[name], *arguments)
        if name == "builtins.range" and 0 < len(arguments) <= 3 and _are_ints(arguments):
            return range(*arguments)
        if name == "torch.device" and 0 < len(arguments) <= 2:
            return ":".join(str(part) for part in self.scalars(arguments))
        parameter = name == "torch._utils._rebuild_parameter"
        if parameter and arguments and isinstance(arguments[0], TensorRef):
            return arguments[0]
        if name.startswith("torch._utils._rebuild_tensor") and len(arguments) >= 4:
            return self.tensor(*arguments[:4])
        self.refuse(f"it calls {name} with arguments that torch.save does not write")

    def container(self, kind: Callable[[Iterable], Any], items: Any = ()) -> Any:
        if not isinstance(items, (list, tuple, dict, set, frozenset)):
            self.refuse(f"it builds a {kind.__name__} from {quote(items)}")
        self.charge(len(items))
        if kind is dict and not isinstance(items, dict):
            self.scalars(key for key, _ in items)
        return kind(self.scalars(items) if kind in (set, frozenset) else items)

    def build(self, target: Any, state: Any) -> None:
        """Set a record's fields; the attributes of a state dict (its version table) are dropped."""
        if isinstance(target, Record) and isinstance(state, dict):
            self.charge(len(state))
            target.fields.update(state)
        elif not isinstance(target, dict):
            self.refuse(f"it sets attributes of {quote(target)}")

    # --- tensors ------------------------------------------------------------------------------

    def storage(self, identity: Any) -> StorageRef:
        """("storage", type, key, location, numel[, view]) -> reference; the location is ignored."""
        try:
            tag, kind, key, _, numel = identity[:5]
            views = identity[5:]
        except (TypeError, ValueError):
            tag = None
        if tag != "storage" or views not in ((), (None,)):
            self.refuse(f"it refers to {quote(tag)}, not to a storage")
        if not isinstance(kind, _Name) or str(kind) not in STORAGES or not isinstance(key, str):
            self.refuse("it has a storage without a known type and key")
        if not _are_ints((numel,)):
            self.refuse(f"it has a storage of size {quote(numel)}")
        found = StorageRef(key, STORAGES[str(kind)], numel)
        if self.storages.setdefault(key, found) != found:
            self.refuse(f"it describes the storage {quote(key)} in two ways")
        return found

    def tensor(self, storage: Any, offset: Any, shape: Any, stride: Any) -> TensorRef:
        if not isinstance(storage, StorageRef):
            self.refuse(f"it makes a tensor of {quote(storage)}")
        if not isinstance(shape, tuple) or not isinstance(stride, tuple) or len(shape) > MAX_DIMS:
            self.refuse("it has a tensor without a valid shape")
        if len(shape) != len(stride) or not _are_ints((offset, *shape, *stride)):
            self.refuse("it has a tensor with an invalid shape, stride or offset")
        numel, last = 1, offset
        for size, step in zip(shape, stride, strict=True):
            numel *= size
            last += (size - 1) * step
        if numel > storage.numel or (numel and last >= storage.numel):
            self.refuse(
                f"it has a tensor of shape {quote(str(list(shape)))} over a storage of only "
                f"{storage.numel} elements"
            )
        return TensorRef(storage, offset, shape, stride)


def _are_ints(values: Iterable) -> bool:
    """Whether all are non-negative integers that fit a signed 64-bit size."""
    return all(type(value) is int and 0 <= value < 1 << 48 for value in values)
