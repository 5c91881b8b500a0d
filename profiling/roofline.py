"""Rooflines of A100, H100 and H200 with every op of the 500M and 2.2B models on them.

FLOPs and bytes of an op come from bench/ladder.py, whose rows are built here without data; the
roofs come from csrc_triton/device.py. An open mark lies on the roof: the best an op can reach. With
a record of ``bench.runs.gpu``, filled marks show what its card reached, for rows that passed their
check. The printed table numbers the ops as the plot does and has the floor of each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import ladder
from bench.harness import argument_parser
from csrc_triton.device import PEAKS
from v2l_fast.console import say, show_table
from v2l_fast.errors import V2LError
from v2l_fast.files import read_json, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXAMPLES = """
  python -m profiling.roofline --out roofline.png
  python -m profiling.roofline bench/results/gpu.json --out roofline.png"""
CARDS = ("A100", "H100", "H200")
MARKS = {"forward": "o", "forward+backward": "s"}


@dataclass(frozen=True)
class Point:
    """An op at one shape, with the FLOPs and bytes of device memory that it needs at least."""

    op: str
    shape: str
    direction: str
    flops: float
    bytes: float

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape} {self.direction}"

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.bytes

    def floor(self, card: str) -> float:
        """Lower bound of the seconds on a card of ``CARDS``."""
        return PEAKS[card].floor(self.flops, self.bytes)


def analytic(size: str = "gpu") -> list[Point]:
    """The ladder's rows of known FLOPs and bytes in bfloat16, without data."""
    with torch.device("meta"):
        rows = [make() for make in ladder.rows("meta", torch.bfloat16, size)]
    return [
        Point(row.op, row.shape, row.direction, row.flops, row.bytes) for row in rows if row.flops
    ]


def measured(record: Mapping[str, Any], source: str) -> tuple[str, dict[Point, float]]:
    """Card of a ``bench.runs.gpu`` record, and seconds of our ops that passed their check.

    Raises:
        V2LError: the record is of another benchmark or card, or has no such op.
    """
    if record.get("benchmark") != "gpu":
        raise V2LError(f"{source}: a record of {record.get('benchmark')!r}; make one with make gpu")
    device = str(record.get("device"))
    card = next((card for card in CARDS if card in device), None)
    if card is None:
        raise V2LError(f"{source}: measured on {device}; use a record of {', '.join(CARDS)}")
    seconds = {
        Point(*(row[field] for field in ("op", "shape", "direction", "flops", "bytes"))):
        row["seconds"]["ours"]
        for row in record["ops"]
        if row["passed"] and row.get("flops")
    }  # fmt: skip
    if not seconds:
        raise V2LError(f"{source}: no op of known FLOPs passed its check; see `failed` in it")
    return card, seconds


# --- plot and table --------------------------------------------------------------------------


def plot(
    points: Sequence[Point], card: str | None, seconds: Mapping[Point, float], path: Path
) -> None:
    """Write a PNG with a panel for each card; ``seconds`` were measured on ``card``."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure((16, 5.5), dpi=110, layout="constrained")
    colors = {op: f"C{i}" for i, op in enumerate(dict.fromkeys(point.op for point in points))}
    panels = figure.subplots(1, len(CARDS), sharey=True)
    for axes, panel in zip(panels, CARDS, strict=True):
        _panel(axes, panel, points, seconds if panel == card else {}, colors)
    # Room for the numbers above the higher roof.
    panels[0].set_ylim(top=4 * max(PEAKS[card].reachable_flops for card in CARDS))
    panels[0].set_ylabel("FLOP/s")
    marks = [
        Line2D([], [], color=color, marker="o", ls="", label=op) for op, color in colors.items()
    ]
    marks += [
        Line2D([], [], color="gray", marker=mark, ls="", mfc="none", label=direction)
        for direction, mark in MARKS.items()
    ]
    marks += [Line2D([], [], color="gray", marker="o", ls="", label="measured")] * bool(seconds)
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        figure.savefig(part, format="png")


def _panel(
    axes: Axes,
    card: str,
    points: Sequence[Point],
    seconds: Mapping[Point, float],
    colors: Mapping[str, str],
) -> None:
    bandwidth, rate = PEAKS[card].reachable_bandwidth, PEAKS[card].reachable_flops
    ridge = rate / bandwidth
    intensities = [point.intensity for point in points]
    low, high = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
    axes.plot([low, ridge, high], [low * bandwidth, rate, rate], color="black", linewidth=1)
    for number, point in enumerate(points, 1):
        style = {"color": colors[point.op], "marker": MARKS[point.direction], "markersize": 6}
        best = point.flops / point.floor(card)
        axes.plot(point.intensity, best, mfc="none", **style)
        if point in seconds:
            reached = point.flops / seconds[point]
            axes.plot([point.intensity] * 2, [reached, best], color=style["color"], linewidth=0.5)
            axes.plot(point.intensity, reached, **style)
            at = (point.intensity, reached)
            axes.annotate(str(number), at, (5, -3), textcoords="offset points", fontsize=6)
    for intensity, numbers in _neighbors(points):
        at = (intensity, min(intensity * bandwidth, rate))
        axes.annotate(", ".join(map(str, numbers)), at, (0, 5), textcoords="offset points",
                      fontsize=7, rotation=-45, ha="right", va="bottom")  # fmt: skip
    title = f"{card}: {rate / 1e12:.0f} TFLOP/s, {bandwidth / 1e12:.1f} TB/s"
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", title=title)
    axes.grid(alpha=0.3, which="major")


def _neighbors(points: Sequence[Point]) -> list[tuple[float, list[int]]]:
    """(intensity, numbers) of points that are so close on the roof that they share a label."""
    groups: list[tuple[float, list[int]]] = []
    for point, number in sorted(zip(points, range(1, len(points) + 1), strict=True),
                                key=lambda pair: pair[0].intensity):  # fmt: skip
        if not groups or point.intensity > 1.25 * groups[-1][0]:
            groups.append((point.intensity, []))
        groups[-1][1].append(number)
    return groups


def _records(
    points: Sequence[Point], card: str | None, seconds: Mapping[Point, float]
) -> list[dict[str, Any]]:
    rows = []
    for number, point in enumerate(points, 1):
        row = {"number": number, **asdict(point), "intensity": point.intensity}
        row["floor_seconds"] = {name: point.floor(name) for name in CARDS}
        if card is not None and point in seconds:
            row["seconds"] = seconds[point]
            row["roofline_share"] = point.floor(card) / seconds[point]
        rows.append(row)
    return rows


def _print_table(rows: Sequence[Mapping[str, Any]], card: str | None) -> None:
    columns = ["#", "op", "GFLOP", "MB", "FLOP/B", *CARDS]
    columns += [f"measured on {card}", "roofline"] if card else []
    table = []
    for row in rows:
        cells = [f"{row['number']:>3}", f"{row['op']} {row['shape']} {row['direction']}"]
        cells += [f"{row['flops'] / 1e9:>10,.3f}"]
        numbers = [row["bytes"] / 1e6, row["intensity"]]
        numbers += [floor * 1e6 for floor in row["floor_seconds"].values()]
        cells += [f"{number:>10,.1f}" for number in numbers]
        if "seconds" in row:
            cells += [f"{row['seconds'] * 1e6:>10,.1f}", f"{row['roofline_share']:.0%}"]
        table.append(cells + [""] * (len(columns) - len(cells)))
    show_table(columns, table, title="Floors in microseconds")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argument_parser("profiling.roofline", __doc__, EXAMPLES)
    parser.add_argument("record", nargs="?", type=Path, help="of bench.runs.gpu")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args(arguments)
    try:
        card, seconds = None, {}
        if options.record:
            card, seconds = measured(read_json(options.record), str(options.record))
    except V2LError as error:
        sys.exit(str(error))
    # Analytic points come first, so that their numbers do not depend on the record.
    points = list(dict.fromkeys([*analytic(), *seconds]))
    plot(points, card, seconds, options.out)
    rows = _records(points, card, seconds)
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        _print_table(rows, card)
        say(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
