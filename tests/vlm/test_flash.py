"""FlashAttention 2 in one-token steps: its arguments, checked by a stand-in for the package.

The package itself needs a GPU.
"""

from __future__ import annotations

import importlib.metadata
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests import tiny
from tests.golden import relative
from v2l_fast.vlm.decoder import flash_usable


def flash_attn_with_kvcache(q, k_cache, v_cache, *, cache_seqlens, cache_batch_idx, softmax_scale):
    """q [E, 1, heads, d]; caches [rows, capacity, kv heads, d]; lengths and rows [E] int32."""
    assert cache_seqlens.dtype == torch.int32 and k_cache.stride(-1) == v_cache.stride(-1) == 1
    assert cache_batch_idx is None or cache_batch_idx.dtype == torch.int32
    out = torch.empty_like(q)
    for example, length in enumerate(cache_seqlens.tolist()):
        row = example if cache_batch_idx is None else int(cache_batch_idx[example])
        for head in range(q.shape[2]):
            shared = head // (q.shape[2] // k_cache.shape[2])
            keys, values = k_cache[row, :length, shared], v_cache[row, :length, shared]
            weights = (keys @ q[example, 0, head] * softmax_scale).softmax(0)
            out[example, 0, head] = weights @ values
    return out


@pytest.fixture
def stand_in(monkeypatch):
    calls = []

    def called(*args, **options):
        calls.append(options)
        return flash_attn_with_kvcache(*args, **options)

    module = SimpleNamespace(flash_attn_with_kvcache=called)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return calls


@pytest.mark.parametrize("picked", [None, [4, 0, 2]], ids=["first rows", "picked rows"])
@torch.no_grad()
def test_steps_equal_those_of_pytorch(picked, stand_in):
    decoder = tiny.backbone().decoder
    rows = None if picked is None else torch.tensor(picked)
    plain = replace(decoder.new_cache(5, 12), rows=rows)
    assert not plain.flash
    fast = replace(decoder.new_cache(5, 12), rows=rows, flash=True)
    ids = torch.randint(5, 90, (3, 9), generator=torch.Generator().manual_seed(1))
    embedded, lengths = decoder.embed(ids), torch.tensor([6, 2, 4])
    for cache in (plain, fast):
        decoder.forward(embedded[:, :6], decoder.prefill_metadata(3, 6), cache)
    assert not stand_in
    for step in range(3):
        metadata = decoder.decode_metadata(lengths + step, 6 + step + 1)
        token = embedded[:, 6 + step, None]
        expected = decoder.forward(token, metadata, plain)
        assert relative(decoder.forward(token, metadata, fast), expected) <= 3e-6
    assert len(stand_in) == 3 * decoder.num_layers


@torch.no_grad()
def test_compiled_in_one_graph(stand_in):
    decoder = tiny.backbone().decoder
    cache = replace(decoder.new_cache(2, 12), flash=True)

    def step(token, positions, limit):
        return decoder.layer(0, token, decoder.decode_metadata(positions, limit), cache)

    token = torch.randn(2, 1, decoder.config.hidden_size)
    arguments = (token, torch.tensor([3, 5]), 6)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert relative(compiled(*arguments), step(*arguments)) <= 3e-6


def test_when_it_is_used(monkeypatch):
    """By the distribution's version, the GPU and the dtype."""

    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    def cache(dtype=torch.bfloat16, size=64, device="cuda"):
        return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 1, 1, 8, size))

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setenv("V2L_BACKEND", "auto")
    capability, installed = (8, 0), {"flash-attn-4": "4.0.0"}
    assert not flash_usable(cache())
    installed = {"flash-attn": "2.8.3"}
    assert flash_usable(cache())
    assert not flash_usable(cache(torch.float32))
    assert not flash_usable(cache(size=60))
    assert not flash_usable(cache(device="cpu"))
    capability = (7, 5)
    assert not flash_usable(cache())
    capability = (9, 0)
    monkeypatch.setenv("V2L_BACKEND", "reference")
    assert not flash_usable(cache())
