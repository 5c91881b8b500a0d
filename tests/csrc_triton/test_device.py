"""Nearest-key lookup, and that every shipped file can be looked up."""

from __future__ import annotations

import functools

import pytest
import torch

from csrc_triton import device

SHIPPED = device.table
TABLE = {
    "sm_90": [
        {"where": {"kernel": "shrink", "rank": 16, "width": 960}, "config": {"BLOCK": 1}},
        {"where": {"kernel": "shrink", "rank": 64, "width": 960}, "config": {"BLOCK": 2}},
        {"where": {"kernel": "expand"}, "config": {"BLOCK": 3}},
    ],
    "default": [
        {"where": {"kernel": "shrink", "rank": 16}, "config": {"BLOCK": 4}},
        {"where": {"kernel": "combine"}, "config": {"BLOCK": 5}},
    ],
}
FASTER = {
    "sm_90": {"product": [{"rows": [32, 64], "dtype": "bf16"}, {"rows": [1024, None]}]},
}


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    monkeypatch.setattr(device, "table", {"product": TABLE, "faster": FASTER}.__getitem__)
    device._nearest.cache_clear()
    yield
    device._nearest.cache_clear()


@pytest.mark.parametrize(
    ("capability", "key", "block"),
    [
        ((9, 0), {"kernel": "shrink", "rank": 16, "width": 960}, 1),
        ((9, 0), {"kernel": "shrink", "rank": 31, "width": 960}, 1),
        # By ratio, not by difference: 33 is twice 16 and half of 64, 33 is nearer to 64.
        ((9, 0), {"kernel": "shrink", "rank": 33, "width": 960}, 2),
        ((9, 0), {"kernel": "shrink", "rank": 0, "width": 0}, 1),
        ((9, 0), {"kernel": "shrink", "rank": 10**9, "width": 10**9}, 2),
        ((9, 0), {"kernel": "shrink"}, 1),
        ((9, 0), {"kernel": "expand", "rank": 7, "anything": 3}, 3),
        ((9, 0), {"kernel": "combine"}, 5),
        ((8, 0), {"kernel": "shrink", "rank": 512}, 4),
        ((8, 6), {"kernel": "shrink", "rank": 16}, 4),
        ((12, 0), {"kernel": "shrink"}, 4),
        (None, {"kernel": "shrink"}, 4),
    ],
)
def test_nearest(capability, key, block):
    assert device.lookup("product", capability, **key) == {"BLOCK": block}


def test_result_is_the_callers_own():
    device.lookup("product", (9, 0), kernel="expand")["BLOCK"] = 99
    assert device.lookup("product", (9, 0), kernel="expand") == {"BLOCK": 3}


@pytest.mark.parametrize("key", [{"kernel": "other"}, {}, {"kernel": 3}])
def test_no_entry_for_a_word(key):
    with pytest.raises(KeyError, match="product/configs.json has no entry for"):
        device.lookup("product", (8, 0), **key)


@pytest.mark.parametrize(
    ("capability", "op", "shape", "faster"),
    [
        ((9, 0), "product", {"rows": 32, "dtype": "bf16"}, True),
        ((9, 0), "product", {"rows": 64, "dtype": "bf16", "more": 1}, True),
        ((9, 0), "product", {"rows": 65, "dtype": "bf16"}, False),
        ((9, 0), "product", {"rows": 64, "dtype": "fp32"}, False),
        ((9, 0), "product", {"rows": 64}, False),
        ((9, 0), "product", {"rows": 4096}, True),
        ((9, 0), "product", {}, False),
        ((8, 0), "product", {"rows": 4096}, False),
        ((9, 0), "sum", {"rows": 4096}, False),
    ],
)
def test_prefers_fused(capability, op, shape, faster):
    assert device.prefers_fused(op, capability, **shape) is faster


def test_files_are_read_again_when_forgotten():
    first = device.lookup("product", (9, 0), kernel="expand")
    device.table = functools.cache(lambda name: {"default": [{"where": {}, "config": {"B": 9}}]})
    assert device.lookup("product", (9, 0), kernel="expand") == first
    device.clear_cache()
    assert device.lookup("product", (9, 0), kernel="expand") == {"B": 9}


@pytest.mark.parametrize(
    "name", ["perceiver_attention", "rank_projection", "lora_linear", "faster"]
)
def test_shipped_files_are_well_formed(name):
    content = SHIPPED(name)
    assert set(content) <= {"sm_80", "sm_90", "default"}
    if name == "faster":
        return
    for entry in (entry for section in content.values() for entry in section):
        assert set(entry) == {"where", "config"}
        assert {"num_warps", "num_stages"} <= set(entry["config"])
        assert entry["config"]["num_warps"] in (1, 2, 4, 8, 16)
        assert all(isinstance(value, int) for value in entry["config"].values())


def test_devices_without_a_capability():
    assert device.capability(torch.device("cpu")) is None
