"""Adapters in force inside a transformers decoder, an example of the batch at a time."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.golden import relative
from v2l_fast import adapted_linear
from v2l_fast.errors import AdapterError
from v2l_fast.hypernet.adapter import Adapter, BiasAdapter
from v2l_fast.hypernet.adapter_bank import AdapterBank, LayerAdapters

LAYERS, D_IN, D_OUT = 3, 40, 24


def llama(bias_terms: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=D_OUT,
        intermediate_size=D_IN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        mlp_bias=bias_terms,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def factors(rank: int, seed: int) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        {"down_proj": 0.1 * torch.randn(LAYERS, rank, d, generator=generator)}
        for d in (D_IN, D_OUT)
    )


BIAS = BiasAdapter(*factors(2, 100))


def adapter(seed: int, rank: int = 4, bias: BiasAdapter | None = BIAS) -> Adapter:
    return Adapter(*factors(rank, seed), 1.5, bias)


def merged(model: LlamaForCausalLM, adapter: Adapter | None) -> LlamaForCausalLM:
    """A copy with W + s·Bᵀ A for weights."""
    model = copy.deepcopy(model)
    if adapter is not None:
        a, b = (side["down_proj"] for side in adapter.merged())
        for index, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight += adapter.scale * b[index].mT @ a[index]
    return model


IDS = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("bias_terms", [False, True])
@torch.no_grad()
def test_each_example_runs_as_with_its_merged_weights(bias_terms):
    model = llama(bias_terms)
    batch = [adapter(0), None, adapter(1, rank=1), Adapter.compose([adapter(2), adapter(3)])]
    expected = [merged(model, a)(IDS[i, None]).logits[0] for i, a in enumerate(batch)]
    handle = adapted_linear(model, "mlp.down_proj")
    with handle.use(batch):
        actual = handle.model(IDS).logits
    for row, target in zip(actual, expected, strict=True):
        assert relative(row, target) <= 3e-6


@torch.no_grad()
def test_nothing_changes_without_adapters():
    plain, model = llama(), llama()
    expected = plain(IDS).logits
    names = [n for n, _ in plain.named_parameters()]
    handle = adapted_linear(model, "mlp.down_proj")
    assert [n for n, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(model(IDS).logits, expected)
    with handle.use([None] * 4):
        assert torch.equal(model(IDS).logits, expected)
    with handle.use([adapter(0), None, adapter(1), None]):
        mixed = model(IDS).logits
    assert torch.equal(mixed[[1, 3]], expected[[1, 3]])
    assert not torch.isclose(mixed[[0, 2]], expected[[0, 2]]).all(-1).any()
    assert torch.equal(model(IDS).logits, expected)


@torch.no_grad()
def test_an_error_inside_leaves_nothing_behind():
    model = llama()
    handle = adapted_linear(model, "mlp.down_proj")
    expected = model(IDS).logits
    with pytest.raises(RuntimeError, match="inside"), handle.use([adapter(0)] * 4):
        raise RuntimeError("inside")
    assert torch.equal(model(IDS).logits, expected)


@torch.no_grad()
def test_nested_use():
    model = llama()
    handle = adapted_linear(model, "mlp.down_proj")
    with handle.use([adapter(0)] * 4):
        outer = model(IDS).logits
        with handle.use([adapter(1)] * 4):
            inner = model(IDS).logits
        assert torch.equal(model(IDS).logits, outer)
    assert not torch.equal(inner, outer)


def test_threads_do_not_see_each_other():
    model = llama()
    handle = adapted_linear(model, "mlp.down_proj")
    choices = [None, adapter(0), adapter(1, rank=2)]

    @torch.no_grad()
    def run(choice: int) -> torch.Tensor:
        if choices[choice] is None:
            return model(IDS).logits
        with handle.use([choices[choice]] * 4):
            return model(IDS).logits

    alone = [run(i) for i in range(3)]
    order = [0, 1, 2, 1, 0, 2] * 8
    with ThreadPoolExecutor(3) as pool:
        for choice, actual in zip(order, pool.map(run, order), strict=True):
            assert torch.equal(actual, alone[choice])


def test_two_models_do_not_see_each_other():
    first, second = (adapted_linear(llama(), "mlp.down_proj") for _ in range(2))
    with torch.no_grad(), first.use([adapter(0)] * 4):
        assert torch.equal(second.model(IDS).logits, llama()(IDS).logits)


def test_gradients_reach_generated_adapters():
    model = llama()
    linears = [layer.mlp.down_proj for layer in model.model.layers]
    a, b = factors(4, 0)
    leaves = [t["down_proj"][None].repeat(2, 1, 1, 1).requires_grad_() for t in (a, b)]
    per_layer = [
        ({"down_proj": a}, {"down_proj": b})
        for a, b in zip(*(leaf.unbind(1) for leaf in leaves), strict=True)
    ]
    layers = LayerAdapters.compose([per_layer], [0, 1], [1, 1], 1.5, BIAS)
    assert all(slots.index.tolist() == [0, 1] for slots in layers)
    x = torch.randn(3, 5, D_IN)
    actual = [
        replace(slots, index=torch.tensor([0, 1, 1])).apply("down_proj", index, linear, x)
        for index, (slots, linear) in enumerate(zip(layers, linears, strict=True))
    ]
    torch.stack(actual).square().sum().backward()
    assert all(leaf.grad.flatten(2).any(-1).all() for leaf in leaves)
    first, second = (Adapter.of_layers(per_layer, row, 1.5, BIAS) for row in (0, 1))
    packed = AdapterBank.pack([first, second, second], "cpu", torch.float32)
    for index, (linear, expected) in enumerate(zip(linears, actual, strict=True)):
        assert relative(packed.apply("down_proj", index, linear, x), expected) <= 1e-6


def test_packing_gives_an_adapter_one_slot_however_often_it_is_used():
    first, second = adapter(0), adapter(1)
    slots = AdapterBank.pack([first, None, second, first], "cpu", torch.float32)
    assert slots.index.tolist() == [0, -1, 1, 0]
    assert slots.A["down_proj"].shape == (LAYERS, 2, 6, D_IN) and slots.ranks is None
    assert AdapterBank.pack([None, None], "cpu", torch.float32) is None
    ragged = AdapterBank.pack([first, adapter(1, rank=1)], "cpu", torch.bfloat16)
    assert ragged.ranks.tolist() == [6, 3]
    assert not ragged.B["down_proj"][:, 1, 3:].any()
    assert ragged.A["down_proj"].dtype == torch.bfloat16


def test_adapters_that_cannot_share_a_batch():
    other_module = Adapter(*({"up_proj": t["down_proj"]} for t in factors(4, 0)), 1.5)
    other_scale = Adapter(*factors(4, 0), 2.0)
    detached = Adapter(*factors(4, 0), 1.5, detached_bias_id="0123")
    for stranger in (other_module, other_scale):
        with pytest.raises(AdapterError, match="cannot share a batch"):
            AdapterBank.pack([adapter(0), stranger], "cpu", torch.float32)
    with pytest.raises(AdapterError, match="needs the bias adapter"):
        AdapterBank.pack([detached], "cpu", torch.float32)
    a, b = factors(4, 0)
    uneven = Adapter(
        {**a, "up_proj": torch.zeros(LAYERS, 3, D_OUT)},
        {**b, "up_proj": torch.zeros(LAYERS, 3, D_IN)},
        1.5,
    )
    with pytest.raises(AdapterError, match="one rank for all modules"):
        AdapterBank.pack([uneven], "cpu", torch.float32)


@pytest.mark.parametrize("suffix", ["mlp.nothing", "down", "mlp", "self_attn"])
def test_names_that_match_no_stack_of_linears(suffix):
    with pytest.raises(AdapterError, match="no complete stack"):
        adapted_linear(llama(), suffix)


def test_a_batch_of_another_size_is_refused():
    handle = adapted_linear(llama(), "mlp.down_proj")
    with handle.use([adapter(0), None]), pytest.raises(AdapterError, match="batch of 4 .* for 2"):
        handle.model(IDS)
