"""Direct logit attribution (Eq. 13) against hooks on transformers' modules, and its bookkeeping."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.evaluation.plain import with_update
from v2l_fast.evaluation.ablations import (
    answer_direction,
    attribute,
    log_probabilities,
    logit_attribution,
    residual_shifts,
)
from v2l_fast.model import Video2LoRA
from v2l_fast.vlm.smolvlm import SmolVLM

PROMPT = "what happens?"


@torch.no_grad()
def streams(backbone, weights, prompt: str) -> list[torch.Tensor]:
    """What attention, MLP and whole layer give at the last token: three of [L, D]."""
    kept: list[list[torch.Tensor]] = [[], [], []]
    hooks = []
    for layer in weights.model.text_model.layers:
        for module, found in zip((layer.self_attn, layer.mlp, layer), kept, strict=True):

            def keep(module, inputs, output, found=found):
                output = output[0] if isinstance(output, tuple) else output
                found.append(output[0, -1].clone())

            hooks.append(module.register_forward_hook(keep))
    weights(input_ids=torch.tensor([backbone.prompt_builder.question(prompt)]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.stack(found) for found in kept]


def test_shifts_are_those_of_the_written_in_update(model, adapters):
    backbone = model.backbone
    base = streams(backbone, backbone.model, PROMPT)
    adapted = streams(backbone, with_update(backbone, adapters[0]), PROMPT)
    whole, attention, mlp = residual_shifts(model, PROMPT, adapters[0])
    for found, index in ((attention, 0), (mlp, 1), (whole, 2)):
        expected = adapted[index] - base[index]
        size = max(adapted[index].abs().max().item(), 1.0)
        assert torch.allclose(found, expected, rtol=0, atol=1e-4 * size)
    # The first layer's attention sees what the plain model sees.
    assert attention[0].abs().max() == 0 and attention[1].abs().max() > 0


def test_direction_is_the_normalized_mean_output_embedding(model):
    reference = "red circle moves"
    ids = model.backbone.prompt_builder.ids(f" {reference}")
    mean = sum(model.backbone.model.lm_head.weight[i] for i in ids) / len(ids)
    found = answer_direction(model, reference)
    assert found.norm().item() == pytest.approx(1, rel=1e-6)
    assert torch.allclose(found, mean / mean.norm(), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_sum_to_the_whole_shift(model, adapters, examples, dtype):
    base = copy.deepcopy(model.backbone.model).to(dtype)
    backbone = SmolVLM(base, model.backbone.tokenizer, "tiny/base")
    network = copy.deepcopy(model.hypernet).to(dtype)
    one = Video2LoRA(backbone, network)
    adapter = one.internalize(examples[0].video)
    whole, attention, mlp = residual_shifts(one, PROMPT, adapter)
    stream = streams(backbone, base, PROMPT)[2].float()
    size = stream.abs().max() + whole.abs().max()
    # Two additions a layer round base and adapted stream by half a unit in the last place each.
    tolerance = 2 * len(whole) * torch.finfo(dtype).eps * size.item()
    assert whole.abs().max() > 2 * tolerance
    assert torch.allclose((attention + mlp).cumsum(0), whole, rtol=0, atol=tolerance)
    found = attribute(one, examples[0], adapter)
    parts = (found.attention + found.mlp).cumsum(0)
    # The direction has length 1.
    assert torch.allclose(parts, found.whole, rtol=0, atol=tolerance * whole.shape[1] ** 0.5)


def test_the_likelier_reference_gives_the_direction(model, adapters, examples):
    example = examples[0]
    likely = log_probabilities(model, example.prompt, example.references, [adapters[0]])[0]
    direction = answer_direction(model, example.references[int(likely.argmax())])
    whole, attention, mlp = residual_shifts(model, example.prompt, adapters[0])
    found = attribute(model, example, adapters[0])
    assert torch.allclose(found.whole, whole @ direction)
    assert torch.allclose(found.attention, attention @ direction)
    assert torch.allclose(found.mlp, mlp @ direction)


def test_no_adapter_shifts_nothing(model, adapters):
    without = adapters[0].without_layers([0, 1, 2], include_bias=True)
    assert all(shift.abs().max() == 0 for shift in residual_shifts(model, PROMPT, without))


def test_record(model, examples, adapters):
    own = [adapters[0], adapters[0], adapters[1], adapters[2]]
    found = logit_attribution(model, examples, own)
    each = [attribute(model, e, a).whole for e, a in zip(examples, own, strict=True)]
    mean = torch.stack(each).mean(0).tolist()
    assert [row["whole"]["estimate"] for row in found["rows"]] == pytest.approx(mean, rel=1e-5)
