"""Packed turns compute what single turns compute, with a video, without, and with adapters."""

import pytest
import torch

from v2l_fast.hypernet import HyperNetwork
from v2l_fast.shapes.scene import sample_scenes
from v2l_fast.shapes.train_hypernet import shapes_hypernet_config
from v2l_fast.shapes.train_language import answer_logits as vlm_logits
from v2l_fast.shapes.train_language import cache_visual_tokens
from v2l_fast.training.step import answer_logits, generate_adapters
from v2l_fast.training.turns import pack_turns

TURNS = (
    [("What happens?", "a small red bar moves up"), ("What color is the bar?", "red")],
    [("How many objects are there?", "two"), ("What happens?", "yes"), ("Yes?", "no")],
)


@pytest.fixture
def turns(prompts):
    return [[(prompts.question(q), prompts.answer(a)) for q, a in row] for row in TURNS]


@pytest.fixture
def network(base):
    torch.manual_seed(0)
    network = HyperNetwork(shapes_hypernet_config(base))
    with torch.no_grad():
        # Fresh scalers and biases of B are zero, which would make every adapter the identity.
        network.scaler_B["down_proj"].fill_(0.05)
        network.bias_B["down_proj"].normal_(std=0.02)
    return network


@torch.no_grad()
def test_packed_turns_equal_single_turns(base, prompts, turns):
    visual = cache_visual_tokens(base.model, sample_scenes("train", 1, 0), None)[0]
    prefixes = [prompts.video_prefix, prompts.text_prefix]
    pad = prompts.tokenizer.pad_token_id
    packed = pack_turns(prefixes, turns, pad)
    together = vlm_logits(base.model, packed, visual.flatten(0, 1))
    parts = []
    for prefix, row in zip(prefixes, turns, strict=True):
        for turn in row:
            shown = visual if prefix is prompts.video_prefix else visual[:0]
            single = pack_turns([prefix], [[turn]], pad)
            parts.append(vlm_logits(base.model, single, shown.flatten(0, 1)))
    assert torch.allclose(together, torch.cat(parts), atol=1e-4)
    assert packed.targets.tolist() == [i for row in turns for _, answer in row for i in answer]
    assert packed.turns.unique_consecutive().tolist() == [0, 1, 2, 3, 4]


@torch.no_grad()
def test_the_backbones_decoder_agrees_with_transformers(base, prompts, turns):
    packed = pack_turns([prompts.text_prefix] * 2, turns, prompts.tokenizer.pad_token_id)
    found = answer_logits(base.decoder, packed, None, torch.tensor([-1, -1]))
    empty = torch.zeros(0, base.hidden_size)
    assert torch.allclose(found, vlm_logits(base.model, packed, empty), atol=1e-4)


@torch.no_grad()
def test_each_row_runs_with_its_own_adapter(base, prompts, turns, network):
    features = torch.randn(2, 4, 6, 96, generator=torch.Generator().manual_seed(1))
    adapters = generate_adapters(network, features, recompute=False)
    pad = prompts.tokenizer.pad_token_id
    rows = [turns[0], turns[1], turns[0]]
    index = torch.tensor([1, -1, 0])
    packed = pack_turns([prompts.text_prefix] * 3, rows, pad)
    found = answer_logits(base.decoder, packed, adapters, index)

    layers = base.model.model.text_model.layers
    kept = [layer.mlp.down_proj.weight.clone() for layer in layers]
    parts = []
    for row, i in zip(rows, index.tolist(), strict=True):
        for number, layer in enumerate(layers):
            update = 0.0
            if i >= 0:
                a, b = adapters[i].merged()
                update = adapters.scale * b["down_proj"][number].T @ a["down_proj"][number]
            layer.mlp.down_proj.weight.copy_(kept[number] + update)
        single = pack_turns([prompts.text_prefix], [row], pad)
        parts.append(answer_logits(base.decoder, single, None, torch.tensor([-1])))
    expected = torch.cat(parts)
    assert torch.allclose(found, expected, atol=1e-3 * expected.abs().max().item())
    assert not torch.allclose(parts[0], parts[2], atol=1e-2)


def test_recomputing_changes_no_gradient(base, prompts, turns, network):
    features = torch.randn(2, 4, 6, 96, generator=torch.Generator().manual_seed(1))
    packed = pack_turns([prompts.text_prefix] * 2, turns, prompts.tokenizer.pad_token_id)
    gradients = []
    for recompute in (True, False):
        network.zero_grad()
        adapters = generate_adapters(network, features, recompute=recompute)
        logits = answer_logits(base.decoder, packed, adapters, torch.arange(2))
        torch.nn.functional.cross_entropy(logits, packed.targets).backward()
        gradients.append({name: p.grad.clone() for name, p in network.named_parameters()})
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())
    assert all(value.abs().sum() > 0 for value in gradients[0].values())
