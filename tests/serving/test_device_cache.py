"""The adapters in the slots of the device, and those in host memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.serving.engine_parts import MemoryStore
from v2l_fast.errors import AdapterError
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.serving.device_cache import DeviceAdapterCache, HostAdapter, HostAdapterCache

M = "down_proj"


def host_adapter(model, *adapters: Adapter) -> HostAdapter:
    """The adapter as the thread that submits a request prepares it."""
    store = MemoryStore(list(adapters))
    return HostAdapterCache(model, store, 99).get(tuple(store.adapters))


def acquire_and_fill(model, slots: DeviceAdapterCache, name: str, *adapters: Adapter) -> int | None:
    slot = slots.acquire((name,))
    if slot is not None:
        slots.fill(slot, host_adapter(model, *adapters))
    return slot


def holds(slots: DeviceAdapterCache, slot: int, adapter: Adapter) -> bool:
    """Whether a slot holds this adapter and its bias."""
    rank = int(slots.bank.ranks[slot])
    return all(
        torch.equal(tensor[M][:, slot, :rank], side[M])
        for tensor, side in zip((slots.bank.A, slots.bank.B), adapter.merged(), strict=True)
    )


def test_the_least_recently_used_idle_adapter_is_replaced(model, adapters):
    slots = DeviceAdapterCache(model, 2)
    a, b, c = adapters
    first, second = acquire_and_fill(model, slots, "a", a), acquire_and_fill(model, slots, "b", b)
    assert holds(slots, first, a) and holds(slots, second, b)
    assert acquire_and_fill(model, slots, "c", c) is None
    assert acquire_and_fill(model, slots, "a", a) == first
    slots.release(first)
    assert acquire_and_fill(model, slots, "c", c) is None
    slots.release(second)
    third = acquire_and_fill(model, slots, "c", c)
    assert third == second and holds(slots, third, c) and holds(slots, first, a)
    slots.release(first)
    slots.release(third)
    # Both are idle; "a" was used before "c".
    assert acquire_and_fill(model, slots, "b", b) == first
    assert acquire_and_fill(model, slots, "c", c) == third
    assert (slots.hits, slots.misses) == (2, 4)


def test_wider_adapters_make_room_and_keep_the_others(model, adapters):
    slots = DeviceAdapterCache(model, 3)
    first = acquire_and_fill(model, slots, "a", adapters[0])
    bank = slots.bank
    second = acquire_and_fill(model, slots, "abc", *adapters)
    assert slots.bank is not bank
    wide = Adapter.compose(adapters)
    assert holds(slots, first, adapters[0]) and holds(slots, second, wide)
    narrow = adapters[1].prune(1)
    third = acquire_and_fill(model, slots, "pruned", narrow)
    assert holds(slots, third, narrow)
    assert sorted(slots.bank.ranks.tolist()) == [5, 8, 16]
    # A batch without the wide one does not pay for it.
    used = slots.bank_for([first, third])
    assert used.A[M].shape[2] == 8 and used.ranks.tolist() == [8, 8, 5]
    assert slots.bank_for([first, second]) is slots.bank
    # The bias moves with the ranks before it.
    slots.release(third)
    again = acquire_and_fill(model, slots, "b", adapters[1])
    assert again == third and holds(slots, again, adapters[1])
    assert slots.bank_for([again]) is used and used.ranks.tolist() == [8, 8, 8]


def test_filling_only_copies(model, adapters, monkeypatch):
    """Concatenating or converting would wait for the device or use memory that is not pinned."""
    slots, wide = DeviceAdapterCache(model, 2), host_adapter(model, *adapters)
    bias = slots._bias[0][M]
    calls = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            name = getattr(function, "__name__", "")
            if name == "copy_":
                source, target = args[1], args[0]
                calls.append((source.dtype == target.dtype, kwargs, source is bias))
            assert name not in ("cat", "stack", "to", "float", "cpu", "cuda", "pin_memory")
            return function(*args, **kwargs or {})

    with torch.inference_mode():
        slots._widen(16)
    with Watch():
        slots.fill(slots.acquire(("abc",)), wide)
        slots.fill(slots.acquire(("a",)), host_adapter_of(wide, 0))
    assert all(same and kwargs == {"non_blocking": True} for same, kwargs, _ in calls)
    assert len(calls) == 2 * (3 + 1) + 2 * (1 + 1)
    # The bias is there already, for all adapters of this rank.
    slots.release(1)
    calls.clear()
    with Watch():
        slots.acquire(("other",))
        slots.fill(1, host_adapter_of(wide, 1))
    assert len(calls) == 2 and holds(slots, 1, adapters[1])


def host_adapter_of(wide: HostAdapter, part: int) -> HostAdapter:
    return HostAdapter((wide.parts[part],), True)


def test_factors_are_prepared_in_the_dtype_of_the_slots(model, adapters):
    half = adapters[0].to(dtype=torch.float16)
    (part,) = host_adapter(model, half).parts
    assert part.A[M].dtype == part.B[M].dtype == torch.float32
    assert part.A[M].is_contiguous()


def test_an_adapter_keeps_a_bias_of_its_own(model, adapters):
    own = adapters[0].without_layers([0], include_bias=True)
    slots = DeviceAdapterCache(model, 1)
    assert holds(slots, acquire_and_fill(model, slots, "own", own), own)
    slots.release(0)
    assert holds(slots, acquire_and_fill(model, slots, "a", adapters[0]), adapters[0])
    with pytest.raises(AdapterError, match="bias adapter"):
        host_adapter(model, adapters[1], own)


def test_a_failed_copy_loses_no_slot(model, adapters):
    slots = DeviceAdapterCache(model, 1)
    good = host_adapter(model, adapters[0])
    factors = {M: good.parts[0].A[M][:, :, :5]}
    broken = HostAdapter((replace(good.parts[0], A=factors),), True)
    slot = slots.acquire(("broken",))
    with pytest.raises(RuntimeError):
        slots.fill(slot, broken)
    slots.release(slot)
    assert not slots.is_resident(("broken",))
    slot = acquire_and_fill(model, slots, "a", adapters[0])
    assert slot == 0 and holds(slots, slot, adapters[0])


def test_host_memory_is_bounded(model, adapters):
    store = MemoryStore(adapters)
    host = HostAdapterCache(model, store, limit=2)
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
    # A wide adapter counts as several, and a composition takes no memory of its own.
    store.adapters["wide"] = Adapter.compose(adapters)
    host.get(("wide",))
    assert list(host._known) == ["wide"]


def test_an_adapter_with_too_few_layers_is_refused(model, adapters):
    store = MemoryStore(adapters)
    store.adapters["short"] = Adapter(
        {M: adapters[0].A[M][:2]}, {M: adapters[0].B[M][:2]}, adapters[0].scale, adapters[0].bias
    )
    with pytest.raises(AdapterError, match="2 layers"):
        HostAdapterCache(model, store, 4).get(("short",))
