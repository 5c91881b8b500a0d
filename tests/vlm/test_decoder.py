"""The decoder against transformers' own forward on the same weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from tests import tiny
from tests.golden import relative
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.hypernet.adapter_bank import AdapterBank
from v2l_fast.vlm.decoder import _attend

IDS = torch.randint(3, 60, (3, 11), generator=torch.Generator().manual_seed(0))


def text_forward(backbone, ids, **kwargs):
    return backbone.model.model.text_model(input_ids=ids, use_cache=False, **kwargs)


@torch.no_grad()
def test_layer_inputs_equal_hidden_states(backbone):
    expected = text_forward(backbone, IDS, output_hidden_states=True).hidden_states
    actual = list(backbone.decoder.layer_inputs(backbone.decoder.embed(IDS)))
    assert len(actual) == len(expected) - 1 == 3
    assert torch.equal(actual[0], expected[0])
    for one, other in zip(actual, expected, strict=False):
        assert relative(one, other) <= 3e-6


def test_the_last_layer_is_never_run(monkeypatch):
    backbone = tiny.backbone()
    layers = backbone.model.model.text_model.layers

    def fail(x):
        raise AssertionError("the last layer ran")

    monkeypatch.setattr(layers[-1].mlp.down_proj, "forward", fail)
    with torch.no_grad():
        assert len(list(backbone.decoder.layer_inputs(backbone.decoder.embed(IDS)))) == 3


def test_layers_are_computed_lazily(monkeypatch):
    backbone = tiny.backbone()

    def fail(x):
        raise AssertionError("a layer ran ahead")

    monkeypatch.setattr(backbone.model.model.text_model.layers[0].mlp.down_proj, "forward", fail)
    inputs = backbone.decoder.layer_inputs(backbone.decoder.embed(IDS))
    next(inputs)
    with torch.no_grad(), pytest.raises(AssertionError, match="ran ahead"):
        next(inputs)


@torch.no_grad()
def test_hidden_states_and_logits(backbone):
    expected = backbone.model(input_ids=IDS, use_cache=False).logits
    hidden = backbone.decoder.forward(backbone.decoder.embed(IDS))
    assert relative(hidden, text_forward(backbone, IDS).last_hidden_state) <= 3e-6
    actual = backbone.decoder.logits(hidden)
    assert actual.dtype == torch.float32 and relative(actual, expected) <= 3e-6


@torch.no_grad()
def test_half_precision():
    """Error against float64 is at most twice that of transformers' forward in the same dtype."""
    backbone = tiny.backbone()
    exact = copy.deepcopy(backbone.model).double()(input_ids=IDS, use_cache=False).logits
    backbone.model.bfloat16()
    theirs = backbone.model(input_ids=IDS, use_cache=False).logits
    ours = backbone.decoder.logits(backbone.decoder.forward(backbone.decoder.embed(IDS)))
    assert ours.dtype == torch.float32
    assert relative(ours, exact) <= 2 * relative(theirs, exact)


@torch.no_grad()
def test_right_padding_has_no_effect(backbone):
    decoder = backbone.decoder
    whole = decoder.forward(decoder.embed(IDS))
    padded = decoder.embed(IDS).clone()
    padded[0, 4:], padded[1, 9:] = 7.0, -3.0
    actual = decoder.forward(padded)
    for row, length in enumerate((4, 9, 11)):
        assert relative(actual[row, :length], whole[row, :length]) <= 3e-6


@pytest.mark.parametrize("adapted", [False, True])
@torch.no_grad()
def test_prefill_and_decode_equal_one_pass(adapted, backbone, adapters):
    decoder = backbone.decoder
    slots = None
    if adapted:
        slots = AdapterBank.pack([adapters[0], None, adapters[1]], "cpu", torch.float32)
    embedded = decoder.embed(IDS)
    expected = decoder.forward(embedded, adapters=slots)
    lengths = torch.tensor([3, 6, 1])
    # What stands behind a row's prompt is garbage: steps overwrite it before it can be seen.
    start = embedded[:, :6].masked_fill((torch.arange(6) >= lengths[:, None])[..., None], 9.0)
    cache = decoder.new_cache(3, 12)
    assert cache.capacity == 12
    actual = decoder.forward(start, decoder.prefill_metadata(3, 6), cache, slots)
    for row, length in enumerate(lengths):
        assert relative(actual[row, :length], expected[row, :length]) <= 3e-6
    for step in range(5):
        places = lengths + step
        token = embedded[torch.arange(3), places][:, None]
        metadata = decoder.decode_metadata(places, 6 + step + 1)
        actual = decoder.forward(token, metadata, cache, slots)[:, 0]
        assert relative(actual, expected[torch.arange(3), places]) <= 3e-6


@torch.no_grad()
def test_adapters_in_every_linear(backbone):
    """One adapter on all seven linear layers equals merged weights."""
    decoder = backbone.decoder
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    generator = torch.Generator().manual_seed(5)
    a, b = {}, {}
    for name in names:
        linear = backbone.linear(0, name)
        a[name] = 0.1 * torch.randn(3, 4, linear.in_features, generator=generator)
        b[name] = 0.1 * torch.randn(3, 4, linear.out_features, generator=generator)
    adapter = Adapter(a, b, 1.5)
    actual = decoder.forward(
        decoder.embed(IDS), adapters=AdapterBank.pack([adapter] * 3, "cpu", torch.float32)
    )
    merged = tiny.backbone()
    for layer in range(3):
        for name in names:
            weight = merged.linear(layer, name).weight
            weight += adapter.scale * b[name][layer].mT @ a[name][layer]
    assert relative(actual, merged.decoder.forward(merged.decoder.embed(IDS))) <= 3e-6


def test_the_model_is_frozen(backbone):
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert not backbone.model.training


@torch.no_grad()
def test_a_merged_decoder_shares_all_other_weights(backbone, adapters):
    decoder, adapter = backbone.decoder, adapters[0]
    before = decoder.forward(decoder.embed(IDS))
    merged = decoder.merged(adapter)
    slots = AdapterBank.pack([adapter] * 3, "cpu", torch.float32)
    expected = decoder.forward(decoder.embed(IDS), adapters=slots)
    assert relative(merged.forward(merged.embed(IDS)), expected) <= 3e-6
    assert torch.equal(decoder.forward(decoder.embed(IDS)), before)
    own = {id(p) for p in merged.text_model.parameters()}
    own -= {id(p) for p in decoder.text_model.parameters()}
    assert len(own) == decoder.num_layers
    assert not any(p.requires_grad for p in merged.text_model.parameters())


@pytest.mark.parametrize("length", [1, 4])
@torch.no_grad()
def test_masked_attention_asks_for_no_grouped_heads(length, backbone, monkeypatch):
    """PyTorch's fused attention on a GPU takes a mask or grouped heads, not both."""
    decoder, attention = backbone.decoder, F.scaled_dot_product_attention
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, length, 6, 8, generator=generator).transpose(1, 2)
    key, value = torch.randn(2, 3, 2, 9, 8, generator=generator)
    mask = torch.rand(3, 1, length, 9, generator=generator) < 0.6
    mask[..., 0] = True
    expected = attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    calls = []

    def fused(query, key, value, **options):
        calls.append(options)
        assert query.shape[:2] == key.shape[:2] and not options.get("enable_gqa")
        return attention(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    actual = _attend(query, key, value, mask.repeat(1, 1, 3, 1), 0.3, 3)
    assert actual.shape == query.shape and relative(actual, expected) <= 1e-6
    cache = decoder.new_cache(3, 12)
    positions = torch.tensor([0, 2, 5])
    decoder.forward(decoder.embed(IDS[:, :1]), decoder.decode_metadata(positions, 6), cache)
    assert len(calls) == 1 + decoder.num_layers


@torch.no_grad()
def test_layers_share_the_mask_that_is_repeated_for_grouped_heads(backbone, monkeypatch):
    decoder, attention = backbone.decoder, F.scaled_dot_product_attention
    groups = decoder.layers[0].self_attn.num_key_value_groups
    masks = []

    def watched(query, key, value, **options):
        masks.append(options["attn_mask"])
        return attention(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    positions = torch.arange(4).expand(3, 4)
    mask = torch.ones(4, 4, dtype=torch.bool).tril().expand(3, 1, 4, 4)
    decoder.forward(decoder.embed(IDS[:, :4]), decoder.attention_metadata(positions, mask))
    assert len(masks) == decoder.num_layers > 1 and groups > 1
    assert len({mask.data_ptr() for mask in masks}) == 1
    assert torch.equal(masks[0], mask.repeat(1, 1, groups, 1))
