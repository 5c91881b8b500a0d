"""Layer removal (Eq. 12) and update norms against written-out matrices."""

from __future__ import annotations

import pytest
import torch

from tests.evaluation.plain import log_probability, with_update
from v2l_fast.errors import ConfigError
from v2l_fast.evaluation.ablations import (
    adapter_norms,
    diagnostic_scores,
    layer_removal,
    removal_effects,
)


def best(backbone, weights, example) -> float:
    return max(
        log_probability(backbone, weights, example.prompt, text) for text in example.references
    )


def test_effect_is_the_score_without_the_layer_minus_the_full_score(model, examples, adapters):
    backbone, example, adapter = model.backbone, examples[0], adapters[0]
    found = removal_effects(model, example, adapter).tolist()
    full = best(backbone, with_update(backbone, adapter), example)
    assert found[0] == pytest.approx(full, rel=2e-5)
    assert found[-1] == pytest.approx(best(backbone, backbone.model, example), rel=2e-5)
    effects = [
        best(backbone, with_update(backbone, adapter, without=[layer]), example) - full
        for layer in range(adapter.num_layers)
    ]
    assert found[1:-1] == pytest.approx(effects, rel=1e-3, abs=2e-5 * abs(full))
    assert any(abs(effect) > 1e-3 for effect in effects)


def test_record(model, examples, adapters):
    own = [adapters[0], adapters[0], adapters[1], adapters[2]]
    found = layer_removal(model, examples, own)
    assert [row["layer"] for row in found["rows"]] == [0, 1, 2] and found["examples"] == 4
    each = torch.stack(
        [removal_effects(model, e, a) for e, a in zip(examples, own, strict=True)]
    ).mean(0)
    assert found["score"]["estimate"] == pytest.approx(each[0].item(), rel=1e-5)
    others = [adapters[i] for i in (1, 1, 2, 0)]
    for name, given in (("no adapter", [None] * 4), ("another video's adapter", others)):
        scores = [
            diagnostic_scores(model, e.prompt, e.references, [a]).item()
            for e, a in zip(examples, given, strict=True)
        ]
        assert found["controls"][name]["estimate"] == pytest.approx(sum(scores) / 4, rel=1e-5)
    for layer, row in enumerate(found["rows"]):
        assert row["effect"]["estimate"] == pytest.approx(each[1 + layer].item(), abs=1e-5)
        norms = [
            torch.linalg.matrix_norm(
                a.scale * a.B["down_proj"][layer].double().T @ a.A["down_proj"][layer].double()
            ).item()
            for a in own
        ]
        assert row["norm"]["down_proj"] == pytest.approx(sum(norms) / 4, rel=1e-4)


def test_norms(model, adapters):
    found = adapter_norms(model, adapters)
    assert found["adapters"] == 3 and found["rank"] == 4
    norms = found["modules"]["down_proj"]
    assert torch.tensor(norms["rank_norms"]).shape == (3, 4)
    weight = model.backbone.linear(1, "down_proj").weight.norm().item()
    expected = norms["layer_norms"][1] / weight
    assert norms["relative_norms"][1] == pytest.approx(expected, rel=1e-5)
    for side in ("largest", "smallest"):
        assert sum(norms[side].values()) == pytest.approx(1)
    products = torch.stack([a.norms()["rank"]["down_proj"].mean(0) for a in adapters])
    winners = {f"R{r}" for r in products.argmax(1).tolist()}
    assert set(norms["largest"]) == winners


def test_norms_of_several_ranks(model, adapters):
    with pytest.raises(ConfigError, match="one rank"):
        adapter_norms(model, [adapters[0], adapters[1].prune(1)])
