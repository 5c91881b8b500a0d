"""Which adapters lie on the device, and what stays of the others."""

from __future__ import annotations

import pytest
import torch

from tests.serving.engine_parts import MemoryStore
from v2l_fast.adapter import Adapter
from v2l_fast.errors import AdapterError
from v2l_fast.serving.slots import DeviceSlots, HostAdapters

M = "down_proj"


def holds(slots: DeviceSlots, slot: int, adapter: Adapter) -> bool:
    """Whether a slot is this adapter, bias and all."""
    rank = int(slots.tables.ranks[slot])
    return all(
        torch.equal(table[M][:, slot, :rank], side[M])
        for table, side in zip((slots.tables.A, slots.tables.B), adapter.merged(), strict=True)
    )


def test_the_least_recently_used_idle_adapter_goes(model, adapters):
    slots = DeviceSlots(model, 2)
    a, b, c = adapters
    first, second = slots.acquire(("a",), a), slots.acquire(("b",), b)
    assert holds(slots, first, a) and holds(slots, second, b)
    assert slots.acquire(("c",), c) is None
    assert slots.acquire(("a",), a) == first
    slots.release(first)
    assert slots.acquire(("c",), c) is None
    slots.release(second)
    third = slots.acquire(("c",), c)
    assert third == second and holds(slots, third, c) and holds(slots, first, a)
    slots.release(first)
    slots.release(third)
    # Both idle: "a" was used last before "c".
    assert slots.acquire(("b",), b) == first
    assert slots.acquire(("c",), c) == third
    assert (slots.hits, slots.misses) == (2, 4)


def test_wider_adapters_make_room_and_keep_the_others(model, adapters):
    slots = DeviceSlots(model, 3)
    first = slots.acquire(("a",), adapters[0])
    tables = slots.tables
    wide = Adapter.compose(adapters)
    second = slots.acquire(("a", "b", "c"), wide)
    assert slots.tables is not tables
    assert holds(slots, first, adapters[0]) and holds(slots, second, wide)
    narrow = adapters[1].prune(1)
    assert holds(slots, slots.acquire(("pruned",), narrow), narrow)
    assert sorted(slots.tables.ranks.tolist()) == [5, 8, 16]


def test_a_failed_copy_loses_no_slot(model, adapters):
    slots = DeviceSlots(model, 1)
    broken = Adapter({M: adapters[0].A[M][:, :, :5]}, dict(adapters[0].B), 1.0)
    with pytest.raises(RuntimeError):
        slots.acquire(("broken",), broken)
    slot = slots.acquire(("a",), adapters[0])
    assert slot == 0 and holds(slots, slot, adapters[0])


def test_host_memory_is_bounded_and_reads_again(model, adapters):
    store = MemoryStore(adapters)
    host = HostAdapters(model, store, limit=2)
    for id in ("a0", "a1", "a0", "a1"):
        host.get((id,))
    assert store.reads == host.loads == 2
    host.get(("a2",))
    host.get(("a1",))
    assert store.reads == 3
    host.get(("a0",))
    assert store.reads == 4
    host.forget("a0")
    composed = host.get(("a0", "a2"))
    assert store.reads == 6 and composed.rank == adapters[0].rank + adapters[2].rank


def test_adapters_that_slots_cannot_hold(model, adapters):
    store = MemoryStore(adapters)
    store.adapters["short"] = Adapter(
        {M: adapters[0].A[M][:2]}, {M: adapters[0].B[M][:2]}, adapters[0].scale, adapters[0].bias
    )
    with pytest.raises(AdapterError, match="2 layers"):
        HostAdapters(model, store, 4).get(("short",))
