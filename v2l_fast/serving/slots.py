"""Where adapters are: in slots on the device, in host memory, in the store; least recently used go.

Host memory is filled by the threads that submit requests, so that no answer waits for a disk; the
slots belong to the engine's thread alone.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import replace
from typing import Protocol

import torch

from v2l_fast.adapted import AdapterSlots, one_rank
from v2l_fast.adapter import Adapter
from v2l_fast.model import Video2LoRA

Ids = tuple[str, ...]


class Store(Protocol):
    """What the engine needs of an adapter store."""

    def put(self, adapter: Adapter) -> str:
        """Keep it; its id."""

    def get(self, id: str) -> Adapter:
        """The adapter; AdapterError for an unknown id."""


class HostAdapters:
    """Adapters in host memory, attached to the model.

    Args:
        limit: how many; the least recently used are read from the store again.

    Attributes:
        loads: adapters read from the store so far.
    """

    def __init__(self, model: Video2LoRA, store: Store, limit: int) -> None:
        self.loads = 0
        self._model, self._store, self._limit = model, store, limit
        self._pin = model.backbone.decoder.device.type == "cuda"
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Adapter] = OrderedDict()

    def get(self, ids: Ids) -> Adapter:
        """The adapter of these ids, composed if there are several.

        Raises:
            AdapterError: an id is unknown, or its adapter broken or another model's.
        """
        parts = [self._one(id) for id in ids]
        return parts[0] if len(parts) == 1 else Adapter.compose(parts)

    def keep(self, id: str, adapter: Adapter) -> Adapter:
        """Remember an adapter that has just been made or read; it as it is kept."""
        adapter = self._model.attach(adapter)
        one_rank(adapter.A)
        if self._pin:
            # Copies to the device from pinned memory do not wait for it.
            a, b = (
                {module: factor.cpu().pin_memory() for module, factor in side.items()}
                for side in (adapter.A, adapter.B)
            )
            adapter = replace(adapter, A=a, B=b)
        with self._lock:
            self._known[id] = adapter
            self._known.move_to_end(id)
            while len(self._known) > self._limit:
                self._known.popitem(last=False)
        return adapter

    def forget(self, id: str) -> None:
        """Read it from the store again, if it is still there."""
        with self._lock:
            self._known.pop(id, None)

    def _one(self, id: str) -> Adapter:
        with self._lock:
            if id in self._known:
                self._known.move_to_end(id)
                return self._known[id]
            self.loads += 1
        return self.keep(id, self._store.get(id))


class DeviceSlots:
    """``count`` adapters side by side on the device, as a batch uses them.

    Attributes:
        tables: the slots, for :class:`~v2l_fast.generation.batch.Batch`; another object when a
            wider adapter has made them anew.
        hits, misses: requests whose adapter was there, or not.
    """

    def __init__(self, model: Video2LoRA, count: int) -> None:
        self.hits = self.misses = 0
        self._count = count
        self._empty = list(range(count))
        self._config = model.config
        decoder = model.backbone.decoder
        self._placed = {"device": decoder.device, "dtype": decoder.dtype}
        self._slots: OrderedDict[Ids, int] = OrderedDict()
        self._users = [0] * count
        self.tables = self._new_tables(2 * model.config.rank)

    @torch.inference_mode()
    def acquire(self, ids: Ids, adapter: Adapter) -> int | None:
        """The slot of an adapter, which stays there until it is released as often as it was
        acquired; None when all slots are in use."""
        if ids in self._slots:
            self.hits += 1
            slot = self._slots[ids]
        else:
            if not self._empty:
                idle = [known for known, slot in self._slots.items() if not self._users[slot]]
                if not idle:
                    return None
                self._empty.append(self._slots.pop(idle[0]))
            slot = self._empty[-1]
            self._fill(slot, adapter)
            self._slots[ids] = self._empty.pop()
            self.misses += 1
        self._slots.move_to_end(ids)
        self._users[slot] += 1
        return slot

    def release(self, slot: int) -> None:
        """One user less; the adapter stays until its slot is needed."""
        self._users[slot] -= 1

    def _fill(self, slot: int, adapter: Adapter) -> None:
        sides = adapter.merged()
        rank = one_rank(sides[0])
        tables = self.tables
        width = next(iter(tables.A.values())).shape[2]
        if rank > width:
            # In steps of doubled width, so that ever wider adapters do not each make new tables.
            wider = self._new_tables(max(rank, 2 * width))
            for new, old in ((wider.A, tables.A), (wider.B, tables.B)):
                for module, table in new.items():
                    table[:, :, :width] = old[module]
            wider.ranks.copy_(tables.ranks)
            self.tables = tables = wider
        for side, table in zip(sides, (tables.A, tables.B), strict=True):
            for module, factor in side.items():
                table[module][:, slot, :rank].copy_(factor, non_blocking=True)
        tables.ranks[slot] = rank

    # The compiler tells tensors made in this mode from others: all tables are.
    @torch.inference_mode()
    def _new_tables(self, rank: int) -> AdapterSlots:
        config = self._config

        def zeros(width: int) -> torch.Tensor:
            return torch.zeros(config.num_layers, self._count, rank, width, **self._placed)

        sizes = config.target_modules.items()
        whole = {"dtype": torch.long, "device": self._placed["device"]}
        return AdapterSlots(
            {module: zeros(d_in) for module, (d_in, _) in sizes},
            {module: zeros(d_out) for module, (_, d_out) in sizes},
            torch.empty(0, **whole),
            config.scale,
            torch.zeros(self._count, **whole),
        )
