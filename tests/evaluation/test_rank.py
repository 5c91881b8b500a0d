"""Rank directions: their scores, which are kept, and the ends of the ablation."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests import tiny
from v2l_fast.errors import ConfigError
from v2l_fast.evaluation.ablations import STRATEGIES, kept_directions, rank_ablation
from v2l_fast.evaluation.metrics import token_f1
from v2l_fast.hypernet.adapter_bank import AdapterBank
from v2l_fast.model import Video2LoRA


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


def test_ablation(model, examples, adapters):
    own = [adapters[0], adapters[0], adapters[1], adapters[2]]
    asked = []

    def metric(answer: str, reference: str) -> float:
        asked.append(answer)
        return token_f1(answer, reference)

    found = rank_ablation(model, examples, own, metric, (1, 2, 16), (0, 1), max_new_tokens=4)
    rows = {row["k"]: row for row in found["rows"]}
    assert list(rows) == [0, 1, 2, 4] and found["rank"] == 4
    for k, full in ((0, 4), (4, 0)):
        assert rows[k]["top"] == rows[k]["bottom"] == rows[k]["random"]
        assert rows[k]["remove-top"] == rows[full]["top"]
    assert rows[2]["remove-top"] == rows[2]["bottom"]
    # 2 ends, top and bottom and two seeds at k = 1 and 2, bottom 3, and 2 controls; each reference
    # is scored once.
    assert len(asked) == (2 + 4 + 4 + 1 + 2) * 6
    expected = model.ask([e.prompt for e in examples], own, max_new_tokens=4)
    mean = sum(e.score(t, token_f1) for e, t in zip(examples, expected, strict=True)) / 4
    assert rows[4]["top"]["estimate"] == pytest.approx(mean)
    prompts, others = [e.prompt for e in examples], [adapters[i] for i in (1, 1, 2, 0)]
    for name, given in (("no adapter", None), ("another video's adapter", others)):
        said = model.ask(prompts, given, max_new_tokens=4)
        mean = sum(e.score(t, token_f1) for e, t in zip(examples, said, strict=True)) / 4
        assert found["controls"][name]["estimate"] == pytest.approx(mean)


def test_adapters_of_several_ranks(model, examples, adapters):
    with pytest.raises(ConfigError, match="one rank"):
        rank_ablation(model, examples[:2], [adapters[0], adapters[1].prune(2)], token_f1)
