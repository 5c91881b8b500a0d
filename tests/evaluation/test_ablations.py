"""Ablations against transformers' forward on merged weights, and their records."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from tests import tiny
from tests.evaluation.plain import log_probability, with_update
from v2l_fast.errors import ConfigError
from v2l_fast.evaluation.ablations import (
    STRATEGIES,
    adapter_norms,
    answer_direction,
    attribute,
    compare_chunks,
    diagnostic_scores,
    kept_directions,
    layer_removal,
    log_probabilities,
    logit_attribution,
    rank_ablation,
    removal_effects,
    residual_shifts,
)
from v2l_fast.evaluation.examples import EvalExample, token_f1
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.hypernet.adapter_bank import AdapterBank
from v2l_fast.model import Video2LoRA
from v2l_fast.video.clip import split_clip
from v2l_fast.vlm.smolvlm import SmolVLM

PROMPT = "what happens?"
CANDIDATES = ("red circle moves left then right", "blue", "a large square stays after the circle")


def test_length_normalized_log_probability(model, adapters):
    result = log_probabilities(model, PROMPT, CANDIDATES, [adapters[0], None, adapters[1]])
    assert result.shape == (3, 3) and result.dtype == torch.float64
    plain = [
        with_update(model.backbone, adapters[0]), model.backbone.model,
        with_update(model.backbone, adapters[1]),
    ]  # fmt: skip
    for row, weights in zip(result, plain, strict=True):
        for value, text in zip(row, CANDIDATES, strict=True):
            expected = log_probability(model.backbone, weights, PROMPT, text)
            assert value.item() == pytest.approx(expected, rel=2e-5)


def test_score_is_that_of_the_best_reference(model, adapters):
    table = log_probabilities(model, PROMPT, CANDIDATES, adapters)
    result = diagnostic_scores(model, PROMPT, CANDIDATES, adapters)
    assert torch.equal(result, table.max(1).values)
    assert len({tuple(row) for row in table.tolist()}) == 3


def test_more_rows_than_a_batch(model, adapters):
    """Batches do not see each other."""
    together = log_probabilities(model, PROMPT, CANDIDATES, [*adapters, None] * 2)
    alone = [log_probabilities(model, PROMPT, [c], [adapters[1]]).item() for c in CANDIDATES]
    assert together[1].tolist() == pytest.approx(alone, rel=1e-5)
    assert torch.equal(together[:4], together[4:]) or torch.allclose(together[:4], together[4:])


def test_a_reference_without_tokens(model):
    with pytest.raises(ConfigError, match="has no tokens"):
        log_probabilities(model, PROMPT, ["   "], [None])


# --- rank -----------------------------------------------------------------------------------------


@torch.no_grad()
def logits(model, adapter) -> torch.Tensor:
    decoder = model.backbone.decoder
    prompt = model.backbone.question("what happens?").embeddings[None]
    slots = AdapterBank.pack([adapter], decoder.device, decoder.dtype)
    return decoder.logits(decoder.forward(prompt, adapters=slots))


def test_directions_are_scored_by_norm_product(adapters):
    adapter = adapters[0]
    (a,), (b,) = adapter.A.values(), adapter.B.values()
    scores = adapter.norms()["rank"]["down_proj"]
    for layer in range(adapter.num_layers):
        for r in range(adapter.rank):
            expected = torch.linalg.matrix_norm(a[layer, r, None]) * torch.linalg.matrix_norm(
                b[layer, r, None]
            )
            assert scores[layer, r].item() == pytest.approx(expected.item(), rel=1e-6)
    top, rest = adapter.prune(1).A["down_proj"], adapter.prune(3, "bottom").A["down_proj"]
    for layer in range(adapter.num_layers):
        best = int(scores[layer].argmax())
        assert torch.equal(top[layer, 0], a[layer, best])
        others = [r for r in range(adapter.rank) if r != best]
        assert torch.equal(rest[layer], a[layer, others])


def test_slices_add_up_to_the_update(adapters):
    """Δy = Σ_r s (x A_rᵀ) B_r."""
    adapter = adapters[0]
    (a,), (b,) = adapter.A.values(), adapter.B.values()
    x = torch.randn(5, a.shape[2], generator=torch.Generator().manual_seed(0))
    whole = adapter.scale * (x @ a[1].T) @ b[1]
    slices = [adapter.scale * (x @ a[1, r, None].T) @ b[1, r, None] for r in range(adapter.rank)]
    assert torch.allclose(sum(slices), whole, rtol=1e-4, atol=1e-4 * whole.abs().max())


def test_which_directions_a_strategy_keeps():
    assert kept_directions("top", 2, 8) == [(2, "norm", 0)]
    assert kept_directions("bottom", 2, 8) == [(2, "bottom", 0)]
    assert kept_directions("random", 2, 8, (3, 4)) == [(2, "random", 3), (2, "random", 4)]
    assert kept_directions("remove-top", 2, 8) == [(6, "bottom", 0)]
    for strategy in STRATEGIES:
        removed = strategy == "remove-top"
        assert kept_directions(strategy, 0, 8) == [(8 if removed else 0, "norm", 0)]
        assert kept_directions(strategy, 8, 8) == [(0 if removed else 8, "norm", 0)]


def test_all_directions_kept_is_the_full_adapter(model, adapters):
    for by in ("norm", "bottom", "random"):
        kept = adapters[0].prune(adapters[0].rank, by)
        assert torch.equal(logits(model, kept), logits(model, adapters[0]))


def test_no_direction_kept_is_no_adapter(backbone, clips):
    """Without a bias adapter, that is; with one it is the bias alone."""
    config = dataclasses.replace(tiny.CONFIG, bias_adapter=False)
    model = Video2LoRA(backbone, tiny.hypernetwork(config))
    adapter = model.internalize(clips[0])
    assert torch.equal(logits(model, adapter.prune(0)), logits(model, None))
    assert not torch.equal(logits(model, adapter), logits(model, None))


def test_the_bias_stays(model, adapters):
    assert not torch.equal(logits(model, adapters[0].prune(0)), logits(model, None))
    assert torch.equal(logits(model, adapters[0].prune(0)), logits(model, adapters[1].prune(0)))


def test_rank_record(model, examples, adapters):
    own = [adapters[0], adapters[0], adapters[1], adapters[2]]
    scored = []

    def metric(answer: str, reference: str) -> float:
        scored.append(answer)
        return token_f1(answer, reference)

    result = rank_ablation(model, examples, own, metric, (1, 2, 16), (0, 1), max_new_tokens=4)
    rows = {row["k"]: row for row in result["rows"]}
    assert list(rows) == [0, 1, 2, 4] and result["rank"] == 4
    for k, full in ((0, 4), (4, 0)):
        assert rows[k]["top"] == rows[k]["bottom"] == rows[k]["random"]
        assert rows[k]["remove-top"] == rows[full]["top"]
    assert rows[2]["remove-top"] == rows[2]["bottom"]
    # 2 ends, top and bottom and two seeds at k = 1 and 2, bottom 3, and 2 controls; each reference
    # is scored once.
    assert len(scored) == (2 + 4 + 4 + 1 + 2) * 6
    expected = model.ask([e.prompt for e in examples], own, max_new_tokens=4)
    mean = sum(e.score(t, token_f1) for e, t in zip(examples, expected, strict=True)) / 4
    assert rows[4]["top"]["estimate"] == pytest.approx(mean)
    prompts, others = [e.prompt for e in examples], [adapters[i] for i in (1, 1, 2, 0)]
    for name, controls in (("no adapter", None), ("another video's adapter", others)):
        answers = model.ask(prompts, controls, max_new_tokens=4)
        mean = sum(e.score(t, token_f1) for e, t in zip(examples, answers, strict=True)) / 4
        assert result["controls"][name]["estimate"] == pytest.approx(mean)


def test_rank_ablation_needs_one_rank(model, examples, adapters):
    with pytest.raises(ConfigError, match="the same rank"):
        rank_ablation(model, examples[:2], [adapters[0], adapters[1].prune(2)], token_f1)


# --- layers ---------------------------------------------------------------------------------------


def best(backbone, weights, example) -> float:
    return max(
        log_probability(backbone, weights, example.prompt, text) for text in example.references
    )


def test_effect_is_the_score_without_the_layer_minus_the_full_score(model, examples, adapters):
    backbone, example, adapter = model.backbone, examples[0], adapters[0]
    result = removal_effects(model, example, adapter).tolist()
    full = best(backbone, with_update(backbone, adapter), example)
    assert result[0] == pytest.approx(full, rel=2e-5)
    assert result[-1] == pytest.approx(best(backbone, backbone.model, example), rel=2e-5)
    effects = [
        best(backbone, with_update(backbone, adapter, without=[layer]), example) - full
        for layer in range(adapter.num_layers)
    ]
    assert result[1:-1] == pytest.approx(effects, rel=1e-3, abs=2e-5 * abs(full))
    assert any(abs(effect) > 1e-3 for effect in effects)


def test_removal_record(model, examples, adapters):
    own = [adapters[0], adapters[0], adapters[1], adapters[2]]
    result = layer_removal(model, examples, own)
    assert [row["layer"] for row in result["rows"]] == [0, 1, 2] and result["examples"] == 4
    each = torch.stack(
        [removal_effects(model, e, a) for e, a in zip(examples, own, strict=True)]
    ).mean(0)
    assert result["score"]["estimate"] == pytest.approx(each[0].item(), rel=1e-5)
    others = [adapters[i] for i in (1, 1, 2, 0)]
    for name, controls in (("no adapter", [None] * 4), ("another video's adapter", others)):
        scores = [
            diagnostic_scores(model, e.prompt, e.references, [a]).item()
            for e, a in zip(examples, controls, strict=True)
        ]
        assert result["controls"][name]["estimate"] == pytest.approx(sum(scores) / 4, rel=1e-5)
    for layer, row in enumerate(result["rows"]):
        assert row["effect"]["estimate"] == pytest.approx(each[1 + layer].item(), abs=1e-5)
        norms = [
            torch.linalg.matrix_norm(
                a.scale * a.B["down_proj"][layer].double().T @ a.A["down_proj"][layer].double()
            ).item()
            for a in own
        ]
        assert row["norm"]["down_proj"] == pytest.approx(sum(norms) / 4, rel=1e-4)


def test_norms(model, adapters):
    result = adapter_norms(model, adapters)
    assert result["adapters"] == 3 and result["rank"] == 4
    norms = result["modules"]["down_proj"]
    assert torch.tensor(norms["rank_norms"]).shape == (3, 4)
    weight = model.backbone.linear(1, "down_proj").weight.norm().item()
    expected = norms["layer_norms"][1] / weight
    assert norms["relative_norms"][1] == pytest.approx(expected, rel=1e-5)
    for side in ("largest", "smallest"):
        assert sum(norms[side].values()) == pytest.approx(1)
    products = torch.stack([a.norms()["rank"]["down_proj"].mean(0) for a in adapters])
    winners = {f"R{r}" for r in products.argmax(1).tolist()}
    assert set(norms["largest"]) == winners


def test_norms_need_one_rank(model, adapters):
    with pytest.raises(ConfigError, match="the same rank"):
        adapter_norms(model, [adapters[0], adapters[1].prune(1)])


# --- chunks ---------------------------------------------------------------------------------------


def test_chunk_rows(model, clips):
    clip = clips[0]
    examples = [
        EvalExample(clip, "what happens?", ("red circle moves",), "caption"),
        EvalExample(clip, "which color?", ("red",), "qa"),
    ]
    result = compare_chunks(model, examples, token_f1, (3,), max_new_tokens=6)
    assert [row["chunks"] for row in result["rows"]] == [1, 3]
    assert [row["rank"] for row in result["rows"]] == [4, 12]
    assert result["chunk_position"] is False and result["examples"] == 2
    single, composed = result["rows"]
    parts = [model.internalize(part) for part in split_clip(clip, 3)]
    adapter = Adapter.compose(parts)
    a, _ = adapter.merged()
    assert a["down_proj"].shape[1] == 3 * 4 + 4
    assert torch.equal(a["down_proj"][:, 12:], adapter.bias.A["down_proj"])
    for example in examples:
        answers = model.ask(example.prompt, adapter, max_new_tokens=6)
        score = example.score(answers, token_f1)
        assert composed["score"][example.kind]["estimate"] == pytest.approx(score)
        before = single["score"][example.kind]["estimate"]
        none = result["controls"]["no adapter"][example.kind]["estimate"]
        assert composed["change"][example.kind]["estimate"] == pytest.approx(score - before)
        assert (example.kind in single["kept"]) == (before > none)
        if before > none:
            kept = (score - none) / (before - none)
            assert composed["kept"][example.kind] == pytest.approx(kept)
            assert single["kept"][example.kind] == 1


def test_kept_is_what_lies_above_the_score_without_an_adapter(model, clips):
    """A metric that gives every answer half a point: nothing is kept of nothing."""
    examples = [EvalExample(clips[0], "what happens?", ("red",))]
    result = compare_chunks(model, examples, lambda answer, reference: 0.5, (2,), max_new_tokens=2)
    assert all(row["kept"] == {} for row in result["rows"])


def test_chunks_must_be_positive(model, examples):
    with pytest.raises(ConfigError, match="at least 1"):
        compare_chunks(model, examples, token_f1, (0, 2))


# --- attribution ----------------------------------------------------------------------------------


@torch.no_grad()
def streams(backbone, weights, prompt: str) -> list[torch.Tensor]:
    """What attention, MLP and whole layer give at the last token: three of [L, D]."""
    kept: list[list[torch.Tensor]] = [[], [], []]
    hooks = []
    for layer in weights.model.text_model.layers:
        for module, result in zip((layer.self_attn, layer.mlp, layer), kept, strict=True):

            def keep(module, inputs, output, result=result):
                output = output[0] if isinstance(output, tuple) else output
                result.append(output[0, -1].clone())

            hooks.append(module.register_forward_hook(keep))
    weights(input_ids=torch.tensor([backbone.prompt_builder.question(prompt)]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.stack(result) for result in kept]


def test_shifts_are_those_of_the_written_in_update(model, adapters):
    backbone = model.backbone
    base = streams(backbone, backbone.model, PROMPT)
    adapted = streams(backbone, with_update(backbone, adapters[0]), PROMPT)
    whole, attention, mlp = residual_shifts(model, PROMPT, adapters[0])
    for result, index in ((attention, 0), (mlp, 1), (whole, 2)):
        expected = adapted[index] - base[index]
        size = max(adapted[index].abs().max().item(), 1.0)
        assert torch.allclose(result, expected, rtol=0, atol=1e-4 * size)
    # The first layer's attention sees what the plain model sees.
    assert attention[0].abs().max() == 0 and attention[1].abs().max() > 0


def test_direction_is_the_normalized_mean_output_embedding(model):
    reference = "red circle moves"
    ids = model.backbone.prompt_builder.ids(f" {reference}")
    mean = sum(model.backbone.model.lm_head.weight[i] for i in ids) / len(ids)
    result = answer_direction(model, reference)
    assert result.norm().item() == pytest.approx(1, rel=1e-6)
    assert torch.allclose(result, mean / mean.norm(), atol=1e-6)


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
    result = attribute(one, examples[0], adapter)
    parts = (result.attention + result.mlp).cumsum(0)
    # The direction has length 1.
    assert torch.allclose(parts, result.whole, rtol=0, atol=tolerance * whole.shape[1] ** 0.5)


def test_the_likelier_reference_gives_the_direction(model, adapters, examples):
    example = examples[0]
    likely = log_probabilities(model, example.prompt, example.references, [adapters[0]])[0]
    direction = answer_direction(model, example.references[int(likely.argmax())])
    whole, attention, mlp = residual_shifts(model, example.prompt, adapters[0])
    result = attribute(model, example, adapters[0])
    assert torch.allclose(result.whole, whole @ direction)
    assert torch.allclose(result.attention, attention @ direction)
    assert torch.allclose(result.mlp, mlp @ direction)


def test_no_adapter_shifts_nothing(model, adapters):
    without = adapters[0].without_layers([0, 1, 2], include_bias=True)
    assert all(shift.abs().max() == 0 for shift in residual_shifts(model, PROMPT, without))


def test_attribution_record(model, examples, adapters):
    own = [adapters[0], adapters[0], adapters[1], adapters[2]]
    result = logit_attribution(model, examples, own)
    each = [attribute(model, e, a).whole for e, a in zip(examples, own, strict=True)]
    mean = torch.stack(each).mean(0).tolist()
    assert [row["whole"]["estimate"] for row in result["rows"]] == pytest.approx(mean, rel=1e-5)
