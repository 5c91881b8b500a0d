"""Two LRU caches of the store's adapters: slots on the device, and factors in host memory.

The threads that submit requests fill host memory with factors in the form that a slot has, so that
the engine's thread, which owns the slots, only starts copies. Adapters are composed in the slot,
side by side; no composed adapter exists in host memory.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from v2l_fast.hypernet.adapter import Adapter, BiasAdapter, Factors
from v2l_fast.hypernet.adapter_bank import AdapterBank, common_rank
from v2l_fast.model import Video2LoRA

Ids = tuple[str, ...]


class Store(Protocol):
    """The part of an adapter store that the engine uses."""

    def put(self, adapter: Adapter) -> str:
        """Store an adapter; returns its id."""

    def get(self, id: str) -> Adapter:
        """Read an adapter; raises AdapterError for an unknown id."""


@dataclass(frozen=True)
class HostFactors:
    """Factors of one adapter in host memory, pinned if the model is on a GPU.

    Attributes:
        A: module -> [L, r, d_in] in the decoder's dtype.
        B: module -> [L, r, d_out] in the decoder's dtype.
        rank: r.
        content: hash of the adapter that they come from.
    """

    A: Factors
    B: Factors
    rank: int
    content: str


@dataclass(frozen=True)
class HostAdapter:
    """The content of a slot: the factors of ``parts`` in order, then the shared bias.

    Attributes:
        parts: one adapter, or several that are composed.
        shared_bias: whether the model's bias adapter follows them.
    """

    parts: tuple[HostFactors, ...]
    shared_bias: bool

    @property
    def rank(self) -> int:
        """Rank without the shared bias."""
        return sum(part.rank for part in self.parts)

    @property
    def content(self) -> tuple[str, ...]:
        """Hashes of the adapters that the parts come from, in order."""
        return tuple(part.content for part in self.parts)


class HostAdapterCache:
    """Adapters in host memory, attached to the model.

    Args:
        limit: number of adapters of the model's rank; a wider one counts as several. Others are
            read from the store again.

    Attributes:
        loads: adapters read from the store so far.
    """

    def __init__(self, model: Video2LoRA, store: Store, limit: int) -> None:
        self.loads = 0
        self._model, self._store = model, store
        self._bias = model.bias
        self._limit = limit * model.config.rank
        self._dtype = model.backbone.decoder.dtype
        self._pin = model.backbone.decoder.device.type == "cuda"
        self._lock = threading.Lock()
        self._known: OrderedDict[str, HostAdapter] = OrderedDict()
        self._ranks = 0

    def get(self, ids: Ids) -> HostAdapter:
        """The adapter for one id, or the composition for several.

        Raises:
            AdapterError: an id is unknown, its adapter is damaged or belongs to another model, or
                adapters with bias adapters of their own cannot be composed.
        """
        adapters = [self._one(id) for id in ids]
        if len(adapters) > 1 and not all(a.shared_bias for a in adapters):
            attached = [self._model.attach(self._store.get(id)) for id in ids]
            return self._prepare(Adapter.compose(attached))
        parts = tuple(part for adapter in adapters for part in adapter.parts)
        return HostAdapter(parts, adapters[0].shared_bias)

    def add(self, id: str, adapter: Adapter) -> HostAdapter:
        """Cache an adapter that was just generated or read."""
        prepared = self._prepare(self._model.attach(adapter))
        with self._lock:
            self._drop(id)
            self._known[id] = prepared
            self._ranks += prepared.rank
            while self._ranks > self._limit and len(self._known) > 1:
                self._drop(next(iter(self._known)))
        return prepared

    def forget(self, id: str) -> None:
        """Read the adapter from the store again when it is needed."""
        with self._lock:
            self._drop(id)

    def _one(self, id: str) -> HostAdapter:
        with self._lock:
            if id in self._known:
                self._known.move_to_end(id)
                return self._known[id]
            self.loads += 1
        return self.add(id, self._store.get(id))

    def _drop(self, id: str) -> None:
        adapter = self._known.pop(id, None)
        if adapter is not None:
            self._ranks -= adapter.rank

    def _prepare(self, adapter: Adapter) -> HostAdapter:
        shared = _is_same(adapter.bias, self._bias)
        a, b = (adapter.A, adapter.B) if shared else adapter.merged()
        sides = self._convert(a), self._convert(b)
        factors = HostFactors(*sides, common_rank(a), adapter.content_hash)
        return HostAdapter((factors,), shared and self._bias is not None)

    def _convert(self, side: Factors) -> Factors:
        converted = {}
        for module, factor in side.items():
            factor = factor.detach().to("cpu", self._dtype).contiguous()
            # Copies from pinned memory are asynchronous.
            converted[module] = factor.pin_memory() if self._pin else factor
        return converted


def _is_same(first: BiasAdapter | None, second: BiasAdapter | None) -> bool:
    return first is second or (first is not None and first == second)


class DeviceAdapterCache:
    """``count`` adapter slots side by side on the device, as a batch uses them.

    :meth:`acquire` reserves a slot, :meth:`fill` writes it, and :meth:`release` gives it back.

    Attributes:
        bank: the slots, for :class:`~v2l_fast.generation.ModelRunner`; replaced by a wider one when
            an adapter needs it.
        hits, misses: requests whose adapter was in a slot, or was not.
    """

    def __init__(self, model: Video2LoRA, count: int) -> None:
        self.hits = self.misses = 0
        self._count = count
        self._config = model.config
        decoder = model.backbone.decoder
        self._like = {"device": decoder.device, "dtype": decoder.dtype}
        self._may_narrow = decoder.device.type == "cpu" and not decoder.is_compiled
        self._slot_of: dict[Ids, int] = {}
        self._ids: list[Ids | None] = [None] * count
        self._uses = [0] * count
        self._ranks = [0] * count
        self._filled: set[int] = set()
        # Slots without uses, the least recently used first.
        self._idle: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))
        # First rank of the bias in each slot, -1 for none: it is copied again only if it moves.
        self._bias_start = [-1] * count
        with torch.inference_mode():
            self._bias = _bias_factors(model.bias, self._like)
        self._stream = torch.cuda.Stream() if decoder.device.type == "cuda" else None
        self.bank = self._new_bank(2 * model.config.rank)
        self._narrow: dict[int, AdapterBank] = {}

    @property
    def count(self) -> int:
        """The number of slots."""
        return self._count

    @property
    def resident(self) -> Ids:
        """The ids of the adapters in the slots, each once; any thread may ask."""
        return tuple(dict.fromkeys(id for ids in list(self._slot_of) for id in ids))

    def is_resident(self, ids: Ids) -> bool:
        """Whether an adapter is in a slot."""
        return ids in self._slot_of

    def acquire(self, ids: Ids) -> int | None:
        """Reserve the adapter's slot until it is released as often as it was acquired; None if all
        slots are in use."""
        slot = self._slot_of.get(ids)
        if slot is not None:
            self.hits += 1
            self._idle.pop(slot, None)
        elif self._idle:
            slot, _ = self._idle.popitem(last=False)
            self._forget(slot)
            self._slot_of[ids], self._ids[slot] = slot, ids
            self.misses += 1
        else:
            return None
        self._uses[slot] += 1
        return slot

    def release(self, slot: int) -> None:
        """End one use; the adapter stays until its slot is needed."""
        self._uses[slot] -= 1
        if not self._uses[slot]:
            self._idle[slot] = None
            if slot not in self._filled:
                self._forget(slot)
                self._idle.move_to_end(slot, last=False)

    @torch.inference_mode()
    def fill(self, slot: int, adapter: HostAdapter) -> None:
        """Write an adapter into its reserved slot, unless it is already there.

        On a GPU the copies run on a stream of their own. Later passes wait for them on the device;
        this thread does not.
        """
        if slot in self._filled:
            return
        if self._stream is None:
            self._copy(slot, adapter)
        else:
            current = torch.cuda.current_stream()
            # Passes under way may still read the slot.
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                self._copy(slot, adapter)
                copied = self._stream.record_event()
            current.wait_event(copied)
        self._filled.add(slot)

    def bank_for(self, slots: Iterable[int]) -> AdapterBank:
        """The bank; on an uncompiled CPU no wider than the adapters in ``slots`` need.

        There every row of a batch costs as much as the bank is wide. Compiled code would need
        another graph for a part of the bank.
        """
        if not self._may_narrow:
            return self.bank
        width = 2 * self._config.rank
        needed = max(self._ranks[slot] for slot in slots)
        while width < needed:
            width *= 2
        if width >= _width(self.bank):
            return self.bank
        if width not in self._narrow:
            bank = self.bank
            sides = (
                {module: tensor[:, :, :width] for module, tensor in side.items()}
                for side in (bank.A, bank.B)
            )
            ranks = bank.ranks.clamp_max(width)
            self._narrow[width] = AdapterBank(*sides, bank.index, bank.scale, ranks)
        return self._narrow[width]

    def _forget(self, slot: int) -> None:
        ids, self._ids[slot] = self._ids[slot], None
        self._filled.discard(slot)
        if ids is not None:
            del self._slot_of[ids]

    def _copy(self, slot: int, adapter: HostAdapter) -> None:
        bias = self._bias if adapter.shared_bias else None
        rank = adapter.rank
        total = rank + (0 if bias is None else self._config.rank)
        self._widen(total)
        bank = self.bank
        copies_bias = bias is not None and self._bias_start[slot] != rank
        if self._bias_start[slot] != rank:
            self._bias_start[slot] = -1
        for index, side in enumerate((bank.A, bank.B)):
            for module, tensor in side.items():
                first = 0
                for part in adapter.parts:
                    factor = (part.A, part.B)[index][module]
                    stop = first + part.rank
                    tensor[:, slot, first:stop].copy_(factor, non_blocking=True)
                    first = stop
                if copies_bias:
                    tensor[:, slot, rank:total].copy_(bias[index][module], non_blocking=True)
        if bias is not None:
            self._bias_start[slot] = rank
        self._ranks[slot] = total
        bank.ranks[slot] = total
        for width, narrow in self._narrow.items():
            narrow.ranks[slot] = min(total, width)

    def _widen(self, rank: int) -> None:
        bank, width = self.bank, _width(self.bank)
        if rank <= width:
            return
        # Double the width, so that ever wider adapters do not each allocate a new bank.
        wider = self._new_bank(max(rank, 2 * width))
        for new, old in ((wider.A, bank.A), (wider.B, bank.B)):
            for module, tensor in new.items():
                tensor[:, :, :width] = old[module]
        wider.ranks.copy_(bank.ranks)
        self.bank = wider
        self._narrow.clear()

    # The compiler distinguishes tensors created in inference mode: every bank is.
    @torch.inference_mode()
    def _new_bank(self, rank: int) -> AdapterBank:
        config = self._config

        def zeros(width: int) -> torch.Tensor:
            return torch.zeros(config.num_layers, self._count, rank, width, **self._like)

        sizes = config.target_modules.items()
        integers = {"dtype": torch.long, "device": self._like["device"]}
        return AdapterBank(
            {module: zeros(d_in) for module, (d_in, _) in sizes},
            {module: zeros(d_out) for module, (_, d_out) in sizes},
            torch.empty(0, **integers),
            config.scale,
            torch.zeros(self._count, **integers),
        )


def _width(bank: AdapterBank) -> int:
    return next(iter(bank.A.values())).shape[2]


def _bias_factors(bias: BiasAdapter | None, like: dict[str, Any]) -> tuple[Factors, Factors] | None:
    """A bias adapter's A and B on the device and in the dtype of the slots."""
    if bias is None:
        return None
    a, b = ({m: t.detach().to(**like) for m, t in side.items()} for side in (bias.A, bias.B))
    return a, b
