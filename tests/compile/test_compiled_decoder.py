"""Decoder layers and the answer forward compile to one graph for every length."""

from __future__ import annotations

import pytest
import torch

from tests.compile.graphs import LENGTHS, assert_one_graph, ramp
from tests.compile.models import INNER, SIZE, decoder
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.hypernet.adapter_bank import AdapterBank
from v2l_fast.vlm.decoder import Decoder, StaticKVCache

BATCH, CAPACITY = 3, 40


def slots(layers: int, dtype: torch.dtype, ragged: bool = False) -> AdapterBank:
    """Two adapters for three examples, one of which runs without; of one rank or of two."""
    ranks = (4, 2 if ragged else 4)
    adapters = [
        Adapter({"down_proj": ramp(layers, r, INNER)}, {"down_proj": ramp(layers, r, SIZE)}, 0.5)
        for r in ranks
    ]
    return AdapterBank.pack([adapters[1], None, adapters[0]], "cpu", dtype)


def filled(decoder: Decoder) -> StaticKVCache:
    """A cache in the middle of an answer."""
    cache = decoder.new_cache(BATCH, CAPACITY)
    cache.keys.copy_(ramp(*cache.keys.shape))
    cache.values.copy_(ramp(*cache.values.shape).flip(0))
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_prefill_layer(dtype):
    model, adapters = decoder(3, dtype), slots(3, dtype)

    def prefill(hidden):
        cache = model.new_cache(BATCH, CAPACITY)
        metadata = model.prefill_metadata(*hidden.shape[:2])
        return model.layer(1, hidden, metadata, cache, adapters), cache.keys, cache.values

    cases = [(ramp(BATCH, s, SIZE, dtype=dtype),) for s in LENGTHS]
    assert_one_graph(prefill, cases)


@pytest.mark.parametrize(
    ("dtype", "backend", "dynamic", "compilations"),
    [(torch.bfloat16, "aot_eager", None, 2), (torch.float32, "inductor", True, 1)],
    ids=["bf16", "fp32-fused"],
)
def test_decode_layer(dtype, backend, dynamic, compilations):
    model, adapters = decoder(3, dtype), slots(3, dtype, ragged=True)

    def step(hidden, keys, values, positions, limit):
        cache = StaticKVCache(keys.clone(), values.clone())
        out = model.layer(1, hidden, model.decode_metadata(positions, limit), cache, adapters)
        return out, cache.keys, cache.values

    cache, hidden = filled(model), ramp(BATCH, 1, SIZE, dtype=dtype)
    cases = [
        (hidden, cache.keys, cache.values, torch.tensor([s - 1, s - 4, s - 2]), s) for s in LENGTHS
    ]
    assert_one_graph(step, cases, backend=backend, dynamic=dynamic, compilations=compilations)


def test_a_cache_is_written_in_place():
    """As generation does it: what one compiled step stores, the next one reads."""
    model, adapters = decoder(2, torch.float32), slots(2, torch.float32)

    def step(hidden, positions, limit, cache):
        return model.forward(hidden, model.decode_metadata(positions, limit), cache, adapters)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected_cache, found_cache = filled(model), filled(model)
    hidden = ramp(BATCH, 1, SIZE)
    for place, limit in enumerate(range(10, 15)):
        positions = torch.tensor([limit - 1, limit - 4, limit - 2])
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=place >= 2):
            actual = compiled(hidden, positions, limit, found_cache)
            hidden = step(hidden, positions, limit, expected_cache)
        assert torch.equal(actual, hidden)
        assert torch.equal(found_cache.keys, expected_cache.keys)
        assert torch.equal(found_cache.values, expected_cache.values)


def test_answer_forward():
    model, adapters = decoder(2, torch.float32), slots(2, torch.float32)

    def answer(embeddings):
        return model.logits(model.forward(embeddings, adapters=adapters))

    assert_one_graph(answer, [(ramp(BATCH, s, SIZE),) for s in LENGTHS])


@pytest.mark.parametrize("cached", [False, True])
def test_more_layers_than_the_compiler_keeps_graphs(cached):
    layers = 10  # the compiler keeps 8 graphs by default
    model = decoder(layers, torch.float32)
    metadata, adapters = model.prefill_metadata(BATCH, 9), slots(layers, torch.float32)
    cache = model.new_cache(BATCH, CAPACITY) if cached else None
    cases = [
        (module, index, ramp(BATCH, 9, SIZE), metadata, cache and cache.layer(index), adapters)
        for index, module in enumerate(model.text_model.layers)
    ]
    assert_one_graph(model.run_layer, cases)
