"""Distributions of scores, drawn (the paper's Figures 9 to 12)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from v2l_fast.data.manifest import Example
from v2l_fast.evaluation.answering import BASELINE, SYSTEM
from v2l_fast.evaluation.comparison import Scores
from v2l_fast.evaluation.report import TITLES
from v2l_fast.files import replacing


def plot_distributions(
    examples: Sequence[Example], scores: Mapping[str, Mapping[str, Scores]], folder: Path
) -> list[Path]:
    """One PNG a metric: left the scores of baseline and system, right their differences, a row of
    panels for each benchmark. Returns the files."""
    from matplotlib.figure import Figure

    written = []
    for metric, by_condition in scores.items():
        panels: dict[str, list[tuple[float, float]]] = {}
        for example in examples:
            base, system = (by_condition[name].get(example.id) for name in (BASELINE, SYSTEM))
            if base is not None and system is not None:
                panels.setdefault(example.dataset, []).append((base, system))
        if not panels:
            continue
        figure = Figure(figsize=(9, 2.6 * len(panels)), layout="constrained")
        axes = figure.subplots(len(panels), 2, squeeze=False)
        for (dataset, pairs), (left, right) in zip(panels.items(), axes, strict=True):
            columns = list(zip(*pairs, strict=True))
            left.hist(columns, bins=20, range=(0, 1), label=[BASELINE, SYSTEM])
            left.set(title=f"{dataset} (n = {len(pairs)})", xlabel=TITLES[metric])
            left.legend()
            differences = [system - base for base, system in pairs]
            right.hist(differences, bins=41, range=(-1, 1), color="tab:gray")
            right.axvline(sum(differences) / len(differences), color="tab:red", label="mean")
            right.set(title=f"{SYSTEM} - {BASELINE}", xlabel=f"difference in {TITLES[metric]}")
            right.legend()
        path = folder / f"{metric}.png"
        with replacing(path) as part:
            figure.savefig(part, format="png", dpi=120)
        written.append(path)
    return written
