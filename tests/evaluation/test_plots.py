"""Every plot is drawn from the record of a measurement."""

from __future__ import annotations

from v2l_fast.evaluation import plots
from v2l_fast.evaluation.ablations import (
    adapter_norms,
    compare_chunks,
    layer_removal,
    logit_attribution,
    rank_ablation,
)
from v2l_fast.evaluation.efficiency import compare_methods, sweep
from v2l_fast.evaluation.examples import token_f1
from v2l_fast.evaluation.methods import MethodSettings


def drawn(path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and 2000 < path.stat().st_size < 60_000


def test_plots_are_written(model, examples, adapters, tmp_path):
    own = [adapters[0], adapters[0], adapters[1], adapters[2]]
    chunks = compare_chunks(model, examples[:2], token_f1, (2,), max_new_tokens=2)
    setting = MethodSettings(model, model.config.sampling.override(longest_edge=32), 2)
    costs = compare_methods(setting, examples[:2], token_f1, repeats=1)
    cells = sweep(model, examples[:3], token_f1, tmp_path / "cells", (1, 3, 4), (32, 64), 2)
    for plot, record in (
        (plots.plot_rank, rank_ablation(model, examples, own, token_f1, max_new_tokens=2)),
        (plots.plot_layers, layer_removal(model, examples, own)),
        (plots.plot_logits, logit_attribution(model, examples, own)),
        (plots.plot_norms, adapter_norms(model, adapters)),
        (plots.plot_chunks, {"zero-shot": chunks, "trained": chunks}),
        (plots.plot_amortized, costs),
        (plots.plot_budgets, [costs, costs | {"visual_tokens": 99}]),
        (plots.plot_sweep, cells),
        (
            plots.plot_conditions,
            {"share": {"direct": {"estimate": 0.5, "low": 0.25, "high": 0.75}}},
        ),
    ):
        path = tmp_path / "plots" / f"{plot.__name__}.png"
        plot(record, path)
        assert drawn(path), plot.__name__
    assert len(list((tmp_path / "plots").iterdir())) == 9


def test_plots_leave_matplotlib_alone(adapters, model, tmp_path):
    """No figure is registered, no backend chosen."""
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.plot_norms(adapter_norms(model, adapters), tmp_path / "norms.png")
    assert dict(matplotlib.rcParams) == before
