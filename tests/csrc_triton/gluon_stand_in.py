"""A stand-in for Gluon's language that runs ``gluon_attend`` on a CPU, one program after another.

Threads do not exist here: a tensor is whole, and layouts mean nothing. What does exist are the
rules of shared memory that the source must keep, and breaking one raises :class:`Hazard`:

- a product reads what threads wrote only after a fence and then a barrier;
- a buffer is overwritten, by threads or by TMA, only after the products that read it were waited
  for and then a barrier;
- a tile that TMA copies is there only after its barrier in shared memory was waited for in the
  right phase and with the right number of bytes; until then it is NaN;
- pointers are read and written inside of their tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from csrc_triton.perceiver_attention import gluon_attend


class Hazard(AssertionError):
    """The source breaks a rule of shared memory."""


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise Hazard(what)


@dataclass(frozen=True)
class Pointer:
    """Elements of a tensor's storage at ``at``."""

    storage: Tensor
    at: Any

    @classmethod
    def of(cls, tensor: Tensor) -> Pointer:
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        return cls(tensor.as_strided((size,), (1,), 0), torch.tensor(tensor.storage_offset()))

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.storage.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.storage, self.at + other)

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.storage, self.at[index])

    def indices(self, mask: Any) -> tuple[Tensor, Tensor]:
        at = torch.as_tensor(self.at)
        used = torch.ones_like(at, dtype=torch.bool) if mask is None else mask
        at, used = torch.broadcast_tensors(at, torch.as_tensor(used))
        inside = (at >= 0) & (at < len(self.storage))
        _require(bool((inside | ~used).all()), "an access outside of the tensor")
        return at, used


@dataclass(eq=False)
class Shared:
    """A buffer in shared memory.

    Attributes:
        written: "" where a product may read it, else "threads" or "fenced".
        readers: products that read it and may still run for some warp.
    """

    data: Tensor
    written: str = ""
    readers: list[Product] = field(default_factory=list)

    def store(self, value: Tensor) -> None:
        _require(not self.readers, "threads overwrite what a product may still read")
        _require(value.shape == self.data.shape and value.dtype == self.data.dtype, "a store")
        self.data.copy_(value)
        self.written = "threads"

    def permute(self, order: tuple[int, ...]) -> SimpleNamespace:
        return SimpleNamespace(buffer=self, data=self.data.permute(order))


@dataclass(eq=False)
class Barrier:
    """A barrier in shared memory, and the copies that arrive at it."""

    phase: int = 0
    expected: int = 0
    copies: list[tuple[Shared, Tensor]] = field(default_factory=list)


@dataclass(eq=False)
class Product:
    """An asynchronous product: ``acc`` + a @ b once it was waited for."""

    a: Shared
    b: Any
    acc: Tensor
    waited: bool = False

    def result(self) -> Tensor:
        self.waited = True
        return self.acc + self.a.data.float() @ self.b.data.float()


@dataclass(frozen=True)
class Descriptor:
    """As ``TensorDescriptor``, of rows."""

    rows: Tensor
    block: list[int]

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    @property
    def block_type(self) -> SimpleNamespace:
        count = self.block[0] * self.block[1]
        return SimpleNamespace(nbytes=count * self.rows.element_size())

    def tile(self, row: int) -> Tensor:
        """Rows past the end are 0."""
        _require(row >= 0, "a copy of rows before the first")
        tile = self.rows.new_zeros(self.block)
        part = self.rows[row : row + self.block[0]]
        tile[: len(part)] = part
        return tile


class Program:
    """One program: the functions that the source calls, and the state of shared memory."""

    def __init__(self, number: int, num_warps: int) -> None:
        self.number, self.num_warps = number, num_warps
        self.buffers: list[Shared] = []

    def allocate(self, dtype: torch.dtype, shape: list[int], layout: object) -> Any:
        if layout == "barriers":
            barriers = [Barrier() for _ in range(shape[0])]
            return SimpleNamespace(index=lambda i: barriers[int(i)])
        made = [Shared(torch.full(shape[-2:], float("nan"), dtype=dtype))
                for _ in range(shape[0] if len(shape) == 3 else 1)]  # fmt: skip
        self.buffers += made
        return SimpleNamespace(index=lambda i: made[int(i)]) if len(shape) == 3 else made[0]

    def fence(self) -> None:
        for buffer in self.buffers:
            if buffer.written == "threads":
                buffer.written = "fenced"

    def barrier(self) -> None:
        for buffer in self.buffers:
            if buffer.written == "fenced":
                buffer.written = ""
            buffer.readers = [product for product in buffer.readers if not product.waited]

    def expect(self, barrier: Barrier, size: int, pred: Any = True) -> None:
        if pred:
            _require(barrier.expected == 0, "a barrier expects a second tile")
            barrier.expected = size

    def copy(self, source: Descriptor, at: list, barrier: Barrier, to: Shared, pred: Any) -> None:
        if not pred:
            return
        _require(not to.readers, "TMA overwrites what a product may still read")
        to.data.fill_(float("nan"))
        barrier.copies.append((to, source.tile(int(at[0]))))

    def wait(self, barrier: Barrier, phase: Any) -> None:
        _require(barrier.phase == int(phase), "a wait for another phase")
        size = sum(tile.nbytes for _, tile in barrier.copies)
        _require(barrier.expected == size > 0, "a wait for other bytes than are copied")
        for buffer, tile in barrier.copies:
            buffer.data.copy_(tile)
        barrier.phase, barrier.expected, barrier.copies = 1 - barrier.phase, 0, []

    def invalidate(self, barrier: Barrier) -> None:
        _require(not barrier.copies, "a copy that nothing waited for")

    def multiply(
        self, a: Shared, b: Any, acc: Tensor, use_acc: bool = True, is_async: bool = False
    ) -> Product:
        for operand in (a, getattr(b, "buffer", b)):
            _require(operand.written == "", "a product reads what threads have just written")
        product = Product(a, b, acc if use_acc else torch.zeros_like(acc))
        for operand in (a, getattr(b, "buffer", b)):
            operand.readers.append(product)
        return product

    def language(self) -> SimpleNamespace:
        """What the source calls ``gl``."""

        def load(pointer: Pointer, mask: Any = None, other: float = 0.0) -> Tensor:
            at, used = pointer.indices(mask)
            found = pointer.storage[torch.where(used, at, 0)]
            return torch.where(used, found, torch.as_tensor(other, dtype=found.dtype))

        def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
            at, used = pointer.indices(mask)
            value = torch.as_tensor(value).to(pointer.storage.dtype)
            pointer.storage[at[used]] = torch.broadcast_to(value, at.shape)[used]

        def nothing(*_: object, **__: object) -> None:
            return None

        return SimpleNamespace(
            **{name: getattr(torch, name) for name in ("float32", "int32", "int64")},
            load=load, store=store, allocate_shared_memory=self.allocate, static_range=range,
            program_id=lambda axis: torch.tensor(self.number), num_warps=lambda: self.num_warps,
            cdiv=lambda a, b: (a + b - 1) // b,
            minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
            maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
            max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis),
            where=lambda c, a, b: torch.where(c, torch.as_tensor(a), torch.as_tensor(b)),
            exp2=torch.exp2, log2=torch.log2,
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
            arange=lambda first, last, layout: torch.arange(first, last),
            convert_layout=lambda x, layout: x, NVMMADistributedLayout=nothing,
            BlockedLayout=nothing, NVMMASharedLayout=nothing, SliceLayout=nothing,
        )  # fmt: skip

    def run(self, **arguments: Any) -> None:
        """``gluon_attend.attend`` with these arguments."""
        scope = dict(vars(gluon_attend))
        for name in ("LOG2E", "LOWEST", "LIMIT"):
            scope[name] = scope[name].value
        scope |= {
            "gl": self.language(), "barrier": self.barrier, "fence_async_shared": self.fence,
            "mbarrier": SimpleNamespace(
                MBarrierLayout=lambda: "barriers", init=lambda barrier, count: None,
                expect=self.expect, wait=self.wait, invalidate=self.invalidate,
            ),
            "load_tile": self.copy,
            "warpgroup_mma": self.multiply,
            "warpgroup_mma_wait": lambda left, deps: deps[0].result(),
        }  # fmt: skip
        for name in ("_copy_tile", "attend"):
            scope[name] = FunctionType(getattr(gluon_attend, name).fn.__code__, scope)
        scope["attend"](**arguments)


def launch(
    programs: int, query: Tensor, context: Tensor, inv_rms: Tensor, bounds: Tensor, part: Tensor,
    part_lse: Tensor, retry: Tensor | None, n_splits: int, online: bool, config: dict[str, int],
) -> None:  # fmt: skip
    """In place of ``gluon_attend.launch``."""
    (_, rows, width), tokens = query.shape, context.shape[1]
    flat = context.flatten(0, 1)
    pointers = {
        f"{name}_ptr": None if tensor is None else Pointer.of(tensor)
        for name, tensor in (
            ("query", query), ("inv_rms", inv_rms), ("bounds", bounds), ("out", part),
            ("lse", part_lse), ("retry", retry),
        )
    }  # fmt: skip
    numbers = {
        "stride_qn": query.stride(0), "stride_qp": query.stride(1),
        "stride_rn": inv_rms.stride(0), "P": rows, "S": tokens, "n_splits": n_splits,
    }  # fmt: skip
    for number in range(programs):
        Program(number, config["num_warps"]).run(
            **pointers, **{name: torch.tensor(value) for name, value in numbers.items()},
            context=Descriptor(flat, [config["BLOCK_S"], width]), Z=width,
            BLOCK_P=config["BLOCK_P"], BLOCK_S=config["BLOCK_S"], STAGES=config["num_stages"],
            ONLINE=online,
        )  # fmt: skip


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """Inside, a tile that selects the form in Gluon runs it on CPU tensors of any dtype."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gluon_attend, "serves", lambda query, context: True)
        patch.setattr(gluon_attend, "launch", launch)
        yield
