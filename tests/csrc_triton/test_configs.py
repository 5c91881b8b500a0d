"""Nearest-key lookup, and that every shipped file can be looked up."""

from __future__ import annotations

import functools
import json
from importlib import resources

import pytest

from csrc_triton import configs

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
    monkeypatch.setattr(configs, "table", {"product": TABLE, "faster": FASTER}.__getitem__)
    configs._nearest.cache_clear()
    yield
    configs._nearest.cache_clear()


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
    assert configs.lookup("product", capability, **key) == {"BLOCK": block}


def test_result_is_the_callers_own():
    configs.lookup("product", (9, 0), kernel="expand")["BLOCK"] = 99
    assert configs.lookup("product", (9, 0), kernel="expand") == {"BLOCK": 3}


@pytest.mark.parametrize("key", [{"kernel": "other"}, {}, {"kernel": 3}])
def test_no_entry_for_a_word(key):
    with pytest.raises(KeyError, match="configs/product.json has no entry for"):
        configs.lookup("product", (8, 0), **key)


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
    assert configs.prefers_fused(op, capability, **shape) is faster


def test_files_are_read_again_when_forgotten():
    first = configs.lookup("product", (9, 0), kernel="expand")
    configs.table = functools.cache(lambda name: {"default": [{"where": {}, "config": {"B": 9}}]})
    assert configs.lookup("product", (9, 0), kernel="expand") == first
    configs.forget()
    assert configs.lookup("product", (9, 0), kernel="expand") == {"B": 9}


def shipped() -> dict[str, dict]:
    files = resources.files(configs).iterdir()
    return {f.name: json.loads(f.read_text()) for f in files if f.name.endswith(".json")}


def test_shipped_files_are_well_formed():
    for name, content in shipped().items():
        assert set(content) <= {"sm_80", "sm_90", "default"}, name
        if name == "faster.json":
            continue
        for entry in (entry for section in content.values() for entry in section):
            assert set(entry) == {"where", "config"}, name
            if entry["where"].get("kernel") == "prefill":
                assert entry["config"].keys() == {"form"}, name
                continue
            assert {"num_warps", "num_stages"} <= set(entry["config"]), name
            assert entry["config"]["num_warps"] in (1, 2, 4, 8, 16), name
            assert all(isinstance(value, int) for value in entry["config"].values()), name
