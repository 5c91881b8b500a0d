"""Plots of the records as PNG files.

matplotlib (the extra ``eval``; Pillow comes with it) is loaded when a plot is drawn; its global
state is never used.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from v2l_fast.data.manifest import Example
from v2l_fast.evaluation.ablations import STRATEGIES
from v2l_fast.evaluation.answers import BASELINE, SYSTEM
from v2l_fast.evaluation.efficiency import amortized
from v2l_fast.evaluation.report import TITLES, Scores
from v2l_fast.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

# Questions per video up to which costs are plotted.
_QUESTIONS = 20
# Inches, dots per inch and colors: a plot of three panels stays below 60 KB.
_PANEL, _DPI, _COLORS = (3.6, 2.9), 90, 128


def plot_conditions(shares: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path) -> None:
    """Measure -> condition -> interval: one panel per measure, one bar per condition."""
    panels = []
    for measure, intervals in shares.items():

        def draw(axes: Axes, measure: str = measure, intervals: Mapping = intervals) -> None:
            estimates, errors = _errors(list(intervals.values()))
            axes.barh(list(intervals), estimates, xerr=errors, capsize=2)
            axes.invert_yaxis()
            axes.set(xlabel=measure, xlim=(0, 1.02), xticks=(0, 0.25, 0.5, 0.75, 1))

        panels.append(draw)
    _save(panels, path, "Conditions")


def plot_rank(record: Mapping[str, Any], path: Path) -> None:
    """Score against kept directions, one line per strategy (Figure 6)."""
    rows = record["rows"]

    def draw(axes: Axes) -> None:
        positions = range(len(rows))
        for strategy in STRATEGIES:
            _line(axes, positions, [row[strategy] for row in rows], strategy)
        axes.set_xticks(positions, [str(row["k"]) for row in rows])
        axes.set(xlabel="directions k kept (remove-top: removed)", ylabel="score")
        axes.legend(fontsize=7)

    _save([draw], path, f"Rank-direction ablation, {record['examples']} examples")


def plot_layers(record: Mapping[str, Any], path: Path) -> None:
    """Signed effect of removing a layer's update, and its norm (Figure 7)."""
    rows = record["rows"]
    layers = [row["layer"] for row in rows]

    def effects(axes: Axes) -> None:
        _bars(axes, layers, [row["effect"] for row in rows])
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set(xlabel="layer removed", ylabel="effect on S (nats a token)")

    def norms(axes: Axes) -> None:
        for module in rows[0]["norm"]:
            axes.plot(layers, [row["norm"][module] for row in rows], marker="o", label=module)
        axes.set(xlabel="layer", ylabel="‖ΔW‖ (Frobenius)")
        axes.legend(fontsize=7)

    _save([effects, norms], path, f"Layer removal, {record['examples']} examples")


def plot_logits(record: Mapping[str, Any], path: Path) -> None:
    """Direct logit attribution by layer, whole and in parts (Figure 8)."""
    rows = record["rows"]
    layers = [row["layer"] for row in rows]

    def whole(axes: Axes) -> None:
        _line(axes, layers, [row["whole"] for row in rows], "residual stream")
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set(xlabel="layer", ylabel="DLA")
        axes.legend(fontsize=7)

    def parts(axes: Axes) -> None:
        for part in ("attention", "mlp"):
            _line(axes, layers, [row[part] for row in rows], part)
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set(xlabel="layer", ylabel="DLA of the part")
        axes.legend(fontsize=7)

    _save([whole, parts], path, f"Direct logit attribution, {record['examples']} examples")


def plot_norms(record: Mapping[str, Any], path: Path) -> None:
    """Norm products by layer and direction, and layer norms, two panels per module."""
    panels: list[Callable[[Axes], None]] = []
    for module, norms in record["modules"].items():

        def directions(axes: Axes, norms: Mapping[str, Any] = norms, name: str = module) -> None:
            image = axes.imshow(norms["rank_norms"], aspect="auto", cmap="viridis")
            axes.figure.colorbar(image, ax=axes)
            axes.set_yticks(range(len(norms["rank_norms"])))
            axes.set(xlabel="direction", ylabel="layer", title=f"{name}: ‖A_r‖·‖B_r‖")

        def layers(axes: Axes, norms: Mapping[str, Any] = norms, name: str = module) -> None:
            axes.bar(range(len(norms["relative_norms"])), norms["relative_norms"])
            axes.set(xlabel="layer", ylabel="‖ΔW‖ / ‖W‖", title=name)

        panels += [directions, layers]
    _save(panels, path, f"Generated updates, {record['adapters']} adapters")


def plot_chunks(records: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Share of the single adapter's score above that without an adapter that compositions keep; one
    panel per network."""
    panels = []
    for name, record in records.items():

        def draw(axes: Axes, name: str = name, rows: Sequence = record["rows"]) -> None:
            positions = range(len(rows))
            for kind in rows[0]["kept"]:
                axes.plot(positions, [row["kept"][kind] for row in rows], marker="o", label=kind)
            axes.axhline(0.95, color="black", linewidth=0.6, linestyle=":")
            axes.set_xticks(positions, [str(row["chunks"]) for row in rows])
            axes.set(xlabel="chunks", ylabel="kept of the single adapter's", title=name)
            axes.set_ylim(min([0.0, *(k for row in rows for k in row["kept"].values())]), 1.1)

        panels.append(draw)
    _save(panels, path, "Chunk composition (dotted: 95%)", legend=True)


def plot_amortized(record: Mapping[str, Any], path: Path) -> None:
    """Seconds per question against questions per video, and bytes stored (Figure 2)."""
    rows, counts = record["rows"], range(1, _QUESTIONS + 1)

    def curves(axes: Axes) -> None:
        for index, row in enumerate(rows):
            costs = [amortized(row["preparation"], row["first_token"], n) * 1e3 for n in counts]
            axes.plot(counts, costs, f"C{index}", label=row["method"])
            even = row["break_even"]
            if even is not None and even <= _QUESTIONS:
                axes.plot(even, costs[even - 1], f"C{index}o")
        axes.set(xlabel="questions a video (dot: break-even)", ylabel="ms a question")
        axes.set_yscale("log")
        _plain_log(axes.yaxis)

    def stored(axes: Axes) -> None:
        storing = [row for row in rows if row["bytes"]]
        axes.barh([row["method"] for row in storing], [row["bytes"] / 1e6 for row in storing])
        axes.tick_params(axis="y", labelsize=6)
        axes.set(xlabel="MB stored a video", xscale="log")
        _plain_log(axes.xaxis)

    title = f"{record['videos']} videos, {record['questions']} questions"
    _save([curves, stored], path, title, legend=True)


def plot_budgets(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """First token, preparation and score against visual tokens, one line per method (Figure 4)."""
    tokens = [record["visual_tokens"] for record in records]
    methods = [row["method"] for row in records[0]["rows"]]

    def panel(field: str, label: str, scale: float) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for index, method in enumerate(methods):
                values = [record["rows"][index][field] for record in records]
                if field == "score":
                    values = [value["estimate"] for value in values]
                if any(values):
                    scaled = [value * scale for value in values]
                    axes.plot(tokens, scaled, f"C{index}o-", markersize=3, label=method)
            axes.set(xlabel="visual tokens", ylabel=label, xscale="log")
            _plain_log(axes.xaxis)
            if field != "score":
                axes.set_yscale("log")
                _plain_log(axes.yaxis)

        return draw

    panels = [
        panel("first_token", "first token (ms)", 1e3),
        panel("preparation", "preparation (ms)", 1e3),
        panel("score", "score", 1.0),
    ]
    _save(panels, path, "Efficiency by visual tokens", legend=True)


def plot_sweep(record: Mapping[str, Any], path: Path) -> None:
    """Three heat maps over frames x resolution (Figure 3)."""
    rows = record["rows"]
    frames = sorted({row["frames"] for row in rows})
    edges = sorted({row["longest_edge"] for row in rows})
    cells = {(row["frames"], row["longest_edge"]): row for row in rows}

    def panel(title: str, value: Callable[[Mapping[str, Any]], float], form: str):
        def draw(axes: Axes) -> None:
            grid = [
                [
                    float("nan") if "failed" in cell else value(cell)
                    for cell in (cells.get((f, e), {"failed": ""}) for e in edges)
                ]
                for f in frames
            ]
            axes.imshow(grid, aspect="auto", cmap="cividis", origin="lower")
            for y, line in enumerate(grid):
                for x, number in enumerate(line):
                    text = "-" if number != number else form.format(number)
                    box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.7}
                    axes.text(x, y, text, ha="center", va="center", fontsize=7, bbox=box)
            axes.set_xticks(range(len(edges)), [str(e) for e in edges])
            axes.set_yticks(range(len(frames)), [str(f) for f in frames])
            axes.set(xlabel="longest edge (px)", ylabel="frames", title=title)

        return draw

    panels = [
        panel("score change", lambda c: c["score_change"]["estimate"], "{:+.3f}"),
        panel("first token, direct / adapter", lambda c: c["speedup"], "{:.1f}x"),
        panel("prompt tokens, direct / adapter", lambda c: c["token_reduction"], "{:.0f}x"),
    ]
    _save(panels, path, "Adapter against direct inference")


def _line(axes: Axes, x: Sequence[float], intervals: Sequence[Mapping], label: str) -> None:
    """A line through the estimates, with the intervals as a band."""
    axes.plot(x, [i["estimate"] for i in intervals], marker="o", markersize=3, label=label)
    low, high = ([i[side] for i in intervals] for side in ("low", "high"))
    axes.fill_between(x, low, high, alpha=0.15)


def _plain_log(axis: Axis) -> None:
    """Ticks at 1, 2 and 5 of every decade, written out."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_locator(NullLocator())


def _bars(axes: Axes, x: Sequence[float], intervals: Sequence[Mapping]) -> None:
    estimates, errors = _errors(intervals)
    axes.bar(x, estimates, yerr=errors, capsize=2)


def _errors(intervals: Sequence[Mapping]) -> tuple[list[float], list[list[float]]]:
    """Estimates, and their distances to the lower and upper bounds."""
    estimates = [i["estimate"] for i in intervals]
    down = [i["estimate"] - i["low"] for i in intervals]
    up = [i["high"] - i["estimate"] for i in intervals]
    return estimates, [down, up]


def _save(
    panels: Sequence[Callable[[Axes], None]], path: Path, title: str, legend: bool = False
) -> None:
    """Draw panels side by side and write a PNG atomically."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    from PIL import Image

    width, height = _PANEL
    figure = Figure((width * len(panels), height + 0.3 * legend), dpi=_DPI, layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.tick_params(labelsize=7)
        # Layers, directions and questions are counted.
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        draw(axes)
    figure.suptitle(title, fontsize=9)
    if legend:
        handles = figure.axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=6)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        # A palette halves the file.
        Image.open(buffer).convert("RGB").quantize(_COLORS).save(part, "png", optimize=True)


# --- plots ----------------------------------------------------------------------------------------


def plot_distributions(
    examples: Sequence[Example], scores: Mapping[str, Mapping[str, Scores]], folder: Path
) -> list[Path]:
    """One PNG per metric (Figures 9 to 12): scores of baseline and system on the left, differences
    on the right, one row per benchmark. Returns the files."""
    from matplotlib.figure import Figure

    paths = []
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
        paths.append(path)
    return paths
