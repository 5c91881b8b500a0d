"""Where adapters are: in slots on the device, in host memory, in the store; least recently used go.

Host memory is filled by the threads that submit requests: factors lie there as a slot holds them,
so that the engine's thread, to which the slots belong, only starts copies. Adapters are composed in
the slot, side by side; no composed adapter exists in host memory.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from v2l_fast.hypernet.adapted_linear import AdapterBank, one_rank
from v2l_fast.hypernet.adapter import Adapter, BiasAdapter, Factors
from v2l_fast.model import Video2LoRA

Ids = tuple[str, ...]


class Store(Protocol):
    """What the engine needs of an adapter store."""

    def put(self, adapter: Adapter) -> str:
        """Keep it; its id."""

    def get(self, id: str) -> Adapter:
        """The adapter; AdapterError for an unknown id."""


@dataclass(frozen=True)
class HostFactors:
    """Factors of one adapter in host memory, pinned if the model is on a GPU.

    Attributes:
        A: module -> [L, r, d_in] of the decoder's dtype.
        B: module -> [L, r, d_out] of the decoder's dtype.
        rank: r.
    """

    A: Factors
    B: Factors
    rank: int


@dataclass(frozen=True)
class HostAdapter:
    """What a slot is filled with: the factors of ``parts`` in this order, then the shared bias.

    Attributes:
        parts: one, or several that are composed.
        shared_bias: whether the model's bias adapter belongs with them.
    """

    parts: tuple[HostFactors, ...]
    shared_bias: bool

    @property
    def rank(self) -> int:
        """Rank without the shared bias."""
        return sum(part.rank for part in self.parts)


class HostAdapters:
    """Adapters in host memory, attached to the model.

    Args:
        limit: how many of the model's rank; a wider one counts as several. The least recently used
            are read from the store again.

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
        """The adapter of these ids, composed if there are several.

        Raises:
            AdapterError: an id is unknown, its adapter is broken or another model's, or adapters
                with bias adapters of their own cannot be composed.
        """
        adapters = [self._one(id) for id in ids]
        if len(adapters) > 1 and not all(a.shared_bias for a in adapters):
            attached = [self._model.attach(self._store.get(id)) for id in ids]
            return self._prepared(Adapter.compose(attached))
        parts = tuple(part for adapter in adapters for part in adapter.parts)
        return HostAdapter(parts, adapters[0].shared_bias)

    def keep(self, id: str, adapter: Adapter) -> HostAdapter:
        """Remember an adapter that has just been generated or read; it as it is kept."""
        prepared = self._prepared(self._model.attach(adapter))
        with self._lock:
            self._drop(id)
            self._known[id] = prepared
            self._ranks += prepared.rank
            while self._ranks > self._limit and len(self._known) > 1:
                self._drop(next(iter(self._known)))
        return prepared

    def forget(self, id: str) -> None:
        """Read it from the store again, if it is still there."""
        with self._lock:
            self._drop(id)

    def _one(self, id: str) -> HostAdapter:
        with self._lock:
            if id in self._known:
                self._known.move_to_end(id)
                return self._known[id]
            self.loads += 1
        return self.keep(id, self._store.get(id))

    def _drop(self, id: str) -> None:
        adapter = self._known.pop(id, None)
        if adapter is not None:
            self._ranks -= adapter.rank

    def _prepared(self, adapter: Adapter) -> HostAdapter:
        shared = _same(adapter.bias, self._bias)
        a, b = (adapter.A, adapter.B) if shared else adapter.merged()
        factors = HostFactors(self._final(a), self._final(b), one_rank(a))
        return HostAdapter((factors,), shared and self._bias is not None)

    def _final(self, side: Factors) -> Factors:
        final = {}
        for module, factor in side.items():
            factor = factor.detach().to("cpu", self._dtype).contiguous()
            # Copies to the device from pinned memory do not wait for it.
            final[module] = factor.pin_memory() if self._pin else factor
        return final


def _same(one: BiasAdapter | None, other: BiasAdapter | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or one.id == other.id


class DeviceAdapterCache:
    """``count`` adapters side by side on the device, as a batch uses them.

    A slot is reserved by :meth:`acquire`, written by :meth:`fill` and kept until :meth:`release`.

    Attributes:
        tables: the slots, for :class:`~v2l_fast.generation.ModelRunner`; another object when a
            wider adapter has made them anew.
        hits, misses: requests whose adapter was there, or not.
    """

    def __init__(self, model: Video2LoRA, count: int) -> None:
        self.hits = self.misses = 0
        self._count = count
        self._config = model.config
        decoder = model.backbone.decoder
        self._placed = {"device": decoder.device, "dtype": decoder.dtype}
        self._narrows = decoder.device.type == "cpu" and not decoder.is_compiled
        self._slot_of: dict[Ids, int] = {}
        self._ids: list[Ids | None] = [None] * count
        self._users = [0] * count
        self._ranks = [0] * count
        self._filled: set[int] = set()
        # Slots without users, the least recently used first.
        self._idle: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))
        # Where each slot holds the bias, -1 if it does not: it is written again only if it moves.
        self._bias_at = [-1] * count
        with torch.inference_mode():
            self._bias = _placed(model.bias, self._placed)
        self._stream = torch.cuda.Stream() if decoder.device.type == "cuda" else None
        self.tables = self._new_tables(2 * model.config.rank)
        self._narrow: dict[int, AdapterBank] = {}

    def resident(self, ids: Ids) -> bool:
        """Whether an adapter is on the device."""
        return ids in self._slot_of

    def acquire(self, ids: Ids) -> int | None:
        """Reserve the slot of an adapter until it is released as often as it was acquired; None
        when all slots are in use."""
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
        self._users[slot] += 1
        return slot

    def release(self, slot: int) -> None:
        """One user less; the adapter stays until its slot is needed."""
        self._users[slot] -= 1
        if not self._users[slot]:
            self._idle[slot] = None
            if slot not in self._filled:
                self._forget(slot)
                self._idle.move_to_end(slot, last=False)

    @torch.inference_mode()
    def fill(self, slot: int, adapter: HostAdapter) -> None:
        """Write an adapter into the slot reserved for it, unless it is there.

        On a GPU the copies run on a stream of their own; passes started afterwards wait for them
        on the device, this thread does not.
        """
        if slot in self._filled:
            return
        if self._stream is None:
            self._fill(slot, adapter)
        else:
            current = torch.cuda.current_stream()
            # Passes that have been started may still read the slot.
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                self._fill(slot, adapter)
                copied = self._stream.record_event()
            current.wait_event(copied)
        self._filled.add(slot)

    def used(self, slots: Iterable[int]) -> AdapterBank:
        """The tables, no wider than adapters in ``slots`` need on a CPU that does not compile.

        There every row of a batch costs as much as the widest table. Compiled code would need a
        graph of its own for a part of a table.
        """
        if not self._narrows:
            return self.tables
        width = 2 * self._config.rank
        needed = max(self._ranks[slot] for slot in slots)
        while width < needed:
            width *= 2
        if width >= _width(self.tables):
            return self.tables
        if width not in self._narrow:
            tables = self.tables
            sides = (
                {module: table[:, :, :width] for module, table in side.items()}
                for side in (tables.A, tables.B)
            )
            ranks = tables.ranks.clamp_max(width)
            self._narrow[width] = AdapterBank(*sides, tables.index, tables.scale, ranks)
        return self._narrow[width]

    def _forget(self, slot: int) -> None:
        ids, self._ids[slot] = self._ids[slot], None
        self._filled.discard(slot)
        if ids is not None:
            del self._slot_of[ids]

    def _fill(self, slot: int, adapter: HostAdapter) -> None:
        bias = self._bias if adapter.shared_bias else None
        rank = adapter.rank
        total = rank + (0 if bias is None else self._config.rank)
        self._widen(total)
        tables = self.tables
        if self._bias_at[slot] != rank:
            self._bias_at[slot] = -1
        for place, side in enumerate((tables.A, tables.B)):
            for module, table in side.items():
                first = 0
                for part in adapter.parts:
                    factor = (part.A, part.B)[place][module]
                    stop = first + part.rank
                    table[:, slot, first:stop].copy_(factor, non_blocking=True)
                    first = stop
                if bias is not None and self._bias_at[slot] != rank:
                    table[:, slot, rank:total].copy_(bias[place][module], non_blocking=True)
        if bias is not None:
            self._bias_at[slot] = rank
        self._ranks[slot] = total
        tables.ranks[slot] = total
        for width, narrow in self._narrow.items():
            narrow.ranks[slot] = min(total, width)

    def _widen(self, rank: int) -> None:
        tables, width = self.tables, _width(self.tables)
        if rank <= width:
            return
        # In steps of doubled width, so that ever wider adapters do not each make new tables.
        wider = self._new_tables(max(rank, 2 * width))
        for new, old in ((wider.A, tables.A), (wider.B, tables.B)):
            for module, table in new.items():
                table[:, :, :width] = old[module]
        wider.ranks.copy_(tables.ranks)
        self.tables = wider
        self._narrow.clear()

    # The compiler tells tensors made in this mode from others: all tables are.
    @torch.inference_mode()
    def _new_tables(self, rank: int) -> AdapterBank:
        config = self._config

        def zeros(width: int) -> torch.Tensor:
            return torch.zeros(config.num_layers, self._count, rank, width, **self._placed)

        sizes = config.target_modules.items()
        whole = {"dtype": torch.long, "device": self._placed["device"]}
        return AdapterBank(
            {module: zeros(d_in) for module, (d_in, _) in sizes},
            {module: zeros(d_out) for module, (_, d_out) in sizes},
            torch.empty(0, **whole),
            config.scale,
            torch.zeros(self._count, **whole),
        )


def _width(tables: AdapterBank) -> int:
    return next(iter(tables.A.values())).shape[2]


def _placed(bias: BiasAdapter | None, placed: dict) -> tuple[Factors, Factors] | None:
    """A bias adapter's A and B on a device in a dtype."""
    if bias is None:
        return None
    a, b = ({m: t.detach().to(**placed) for m, t in side.items()} for side in (bias.A, bias.B))
    return a, b
