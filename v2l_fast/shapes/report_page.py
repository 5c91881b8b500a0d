"""The report's records as one Markdown page with plots; nothing is measured here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from v2l_fast.evaluation.answers import BASELINE, SYSTEM
from v2l_fast.evaluation.plots import (
    plot_amortized,
    plot_budgets,
    plot_chunks,
    plot_conditions,
    plot_layers,
    plot_logits,
    plot_norms,
    plot_rank,
    plot_sweep,
)
from v2l_fast.evaluation.report import interval_text, markdown_table, notes
from v2l_fast.evaluation.report import markdown as metric_tables
from v2l_fast.files import write_text

Record = Mapping[str, Any]

INTRODUCTION = """# Results on the shapes world

The paper's measurements, repeated on the small pair that ships with the package, with videos of
moving colored shapes from the test split. No training video shows the same combination of
attributes, but every single object and all words of the questions occur in training. The score of a
caption is the share of the scene's attributes that it states correctly, the score of a question is
exact match, unless a table says otherwise. The first two sections pool the attributes of all
videos; elsewhere every caption has the same weight. The worst numbers come first.

Brackets are 95% intervals over videos: the percentile bootstrap, united below 100 videos with an
exact interval at the effective number of videos; if all videos have the same score, the exact bound
for that number of videos. The page prints several hundred intervals, each at 95% on its own, so
some miss the true value. Layers and directions are numbered from 0. Times are those of a CPU and
toy models: they compare the methods with each other and say little about real models.

`v2l shapes report` writes this page; `--only NAME` measures one section. `v2l evaluate`,
`v2l analyze` and `v2l sweep` make the same measurements for any model and any manifest.
"""


# Files of the page's folder.
FILES = ("README.md",) + tuple(
    f"{name}.png"
    for name in (
        "conditions", "chunks", "amortized", "budgets", "sweep", "rank", "layers", "logits", "norms"
    )
)  # fmt: skip


def write_page(records: Mapping[str, Record], folder: Path) -> Path:
    """Write ``README.md`` and its plots into ``folder``; sections without a record are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = [
        section(records[name], folder) for name, section in SECTIONS.items() if name in records
    ]
    path = folder / "README.md"
    write_text(path, "\n".join([INTRODUCTION, *sections]))
    return path


def _section(name: str, title: str, record: Record, *parts: str) -> str:
    measured = f"`v2l shapes report --only {name}`: {record['videos']} videos, {record['machine']}."
    return "\n\n".join([f"## {title}", measured, *parts]) + "\n"


def _image(name: str, text: str) -> str:
    return f"![{text}]({name}.png)"


def _limits(record: Record, folder: Path) -> str:
    return _section("limits", "What does not work", record, *probe_tables(record))


def probe_tables(record: Record) -> list[str]:
    """The record of :func:`v2l_fast.shapes.probes.probe` as text and tables, worst first."""

    def questions(rows: Sequence[Record], score: str) -> str:
        return markdown_table(
            [
                {
                    "questions about": row["kind"],
                    "n (videos)": f"{row['questions']} ({row['videos']})",
                    **{f"{score}, {name}": share for name, share in row["score"].items()},
                    **({"example": row["example"]} if "example" in row else {}),
                }
                for row in rows
            ]
        )

    def durations(rows: Sequence[Record]) -> str:
        return markdown_table(
            [
                {
                    "seconds": row["seconds"],
                    "frames": row["frames"],
                    **{f"captions, {name}": share for name, share in row["captions"].items()},
                    **{
                        f"questions, {name}": row["questions"][name]
                        for name in (BASELINE, SYSTEM)
                        if "questions" in row
                    },
                }
                for row in rows
            ]
        )

    named = [row["attribute"] for row in record["absent"]]
    lowest = {name: min(row[name] for row in named) for name in (BASELINE, SYSTEM)}
    return [
        "**Absent objects are not denied.** Asked about a shape that is not in the video, or about "
        "the second object of a video with one, both models name an attribute anyway (the lowest "
        f"share of any kind is {lowest[BASELINE]:.3f} direct, {lowest[SYSTEM]:.3f} with the "
        'adapter). Neither model was trained to say "none". Score: share of answers that deny the '
        "object.",
        questions(record["absent"], "denied"),
        "**Questions of kinds that the hypernetwork was not trained on are mostly answered "
        "incorrectly**, although the VLM answers most of them correctly with the video in context.",
        questions(record["untrained"], "correct"),
        "**Neither model learned which object a question refers to.** In videos of two objects, "
        "both are asked about by shape where their answers differ, so chance is 0.5, with the "
        "video in context and with its adapter alike.",
        questions(record["binding"], "correct"),
        "Both models have the information: the same questions, answered from their own captions of "
        "the video.",
        questions(record["binding_captions"], "correct"),
        "**Clips of other durations than the 8 seconds of every training clip**: the same scenes "
        "slower or faster, sampled like files of that duration (4 frames/s; fewer frames below "
        "8 s). Two questions per video, of every kind except binding.",
        durations(record["durations"]),
        "The cause is the times in the prompt: the frames of the 8 s clip with the time stamps of "
        "another duration.",
        durations(record["restamped"]),
    ]


def _table(record: Record, folder: Path) -> str:
    shares = {
        "correct attributes": record["attributes"],
        "exact captions": record["caption_exact"],
    }
    plot_conditions(shares, folder / "conditions.png")
    rows = [
        {"condition": name, **{measure: by[name] for measure, by in shares.items()}}
        for name in record["attributes"]
    ]
    files = [
        {"condition, source": name, "correct attributes": share}
        for name, share in record["encoded_files"].items()
        if isinstance(share, Mapping)
    ]
    return _section(
        "table",
        "Direct, adapter and controls",
        record,
        markdown_table(rows),
        _image("conditions", "correct attributes and exact captions by condition"),
        metric_tables(record["metrics"], notes(record)).strip(),
        f"Read as H.264 files, {record['encoded_files']['videos']} of the same scenes:",
        markdown_table(files),
    )


def _chunks(record: Record, folder: Path) -> str:
    plot_chunks(record["networks"], folder / "chunks.png")
    parts = []
    for name, network in record["networks"].items():
        rows = [
            {
                "chunks": row["chunks"],
                "rank": row["rank"],
                **{
                    kind: f"{share['estimate']:.3f}" + _kept(row, kind)
                    for kind, share in row["score"].items()
                },
            }
            for row in network["rows"]
        ]
        rows += [
            {"chunks": control, "rank": None}
            | {kind: f"{share['estimate']:.3f}" for kind, share in scores.items()}
            for control, scores in network["controls"].items()
        ]
        parts += [f"**{name}**", markdown_table(rows)]
    return _section(
        "chunks",
        "Chunk composition",
        record,
        "Each chunk is internalized on its own, and the adapters are joined along the rank, the "
        "bias adapter once. In parentheses: the share of the single adapter's score above that "
        "without an adapter that is kept; the goal is 95% at 8 chunks. Training on chunks uses up "
        "to 8.",
        *parts,
        _image("chunks", "kept score against number of chunks"),
    )


def _control_rows(column: str, controls: Record) -> list[dict[str, Any]]:
    return [{column: name, "score": score} for name, score in controls.items()]


def _kept(row: Record, kind: str) -> str:
    return f" ({row['kept'][kind]:.0%})" if kind in row["kept"] else ""


def _efficiency(record: Record, folder: Path) -> str:
    budgets = record["budgets"]
    plot_amortized(budgets[0], folder / "amortized.png")
    plot_budgets(budgets, folder / "budgets.png")
    parts = []
    for budget in budgets:
        rows = [
            {
                "method": row["method"],
                "first token (ms)": f"{row['first_token'] * 1e3:.2f}",
                "preparation (ms)": f"{row['preparation'] * 1e3:.1f}",
                "stored (KB)": f"{row['bytes'] / 1e3:.0f}",
                "score": row["score"],
                "tokens as direct": f"{row['same_as_direct']:.0%}",
                "merged / pruned": "-"
                if row["merged"] is None
                else f"{row['merged']:.1f} / {row['pruned']:.1f}",
                "on average (ms)": f"{row['amortized'] * 1e3:.1f}",
                "break-even (questions)": row["break_even"],
            }
            for row in budget["rows"]
        ]
        rows += _control_rows("method", budget["controls"])
        parts += [
            f"**{budget['frames']} frames, {budget['longest_edge']} px, "
            f"{budget['visual_tokens']:.0f} visual tokens**",
            markdown_table(rows),
        ]
    first = budgets[0]
    return _section(
        "efficiency",
        "Efficiency",
        record,
        f"{first['questions']} questions, {first['questions_per_video']:.0f} per video, one at a "
        "time. Direct inference and FrameFusion alone decode and encode the file for every "
        "question; the other methods do so once, as preparation. A method that prepares in P "
        "seconds and answers in q breaks even with direct inference at d seconds per question at "
        "the first n with P + n·q < n·d; its average cost is P / n + q at n = "
        f"{first['questions_per_video']:.0f}. First tokens are medians over questions, preparation "
        "over videos. FrameFusion is our own implementation of its authors' rules and keeps "
        f"{first['keep']:.0%} of the visual tokens; merged and pruned count the tokens that it "
        "removes. Alone it reduces the tokens again for every question, and the question's last "
        "token decides what is pruned; reused, the last token of the video's prompt does. "
        '"Tokens as direct" is the share of answers with exactly the tokens of direct inference.',
        *parts,
        f"At {first['frames']} frames, {first['longest_edge']} px:",
        _image("amortized", "cost per question against questions per video"),
        "All budgets; a line that cannot be seen is covered by another:",
        _image("budgets", "first token, preparation and score against visual tokens"),
    )


def _sweep(record: Record, folder: Path) -> str:
    plot_sweep(record, folder / "sweep.png")
    rows = [
        {
            "frames": row["frames"],
            "px": row["longest_edge"],
            "direct": f"{row['score_direct']:.3f}",
            "adapter": f"{row['score_adapter']:.3f}",
            "change": row["score_change"],
            **{name: f"{score:.3f}" for name, score in row["controls"].items()},
            "first token, direct / adapter": f"{row['speedup']:.1f}x",
            "prompt tokens, direct / adapter": f"{row['token_reduction']:.0f}x",
            **{f"{s} (ms)": f"{v * 1e3:.0f}" for s, v in row["internalization"].items()},
            "peak, direct (MB)": _megabytes(row["peak_direct"]),
            "peak, internalizing (MB)": _megabytes(row["peak_internalization"]),
        }
        for row in record["rows"]
        if "failed" not in row
    ]
    failed = [
        f"{row['frames']} frames, {row['longest_edge']} px: {row['failed']}."
        for row in record["rows"]
        if "failed" in row
    ]
    return _section(
        "sweep",
        "Frames and resolution",
        record,
        "Every cell encodes exactly its number of frames. The pair was trained with 8 frames of "
        "48 pixels, so every other cell is outside of what both models have seen. The change is "
        "adapter - direct. First tokens are timed from decoded frames: unlike in the efficiency "
        "comparison, direct inference does not pay for decoding here. Peak memory is that of the "
        "whole process.",
        markdown_table(rows),
        *failed,
        _image("sweep", "score change, speed-up and token reduction"),
    )


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.0f}"


def _rank(record: Record, folder: Path) -> str:
    plot_rank(record, folder / "rank.png")
    return _section(
        "rank",
        "Rank directions",
        record,
        "Attribute accuracy of captions with k of the adapter's directions, selected by "
        "‖A_r‖·‖B_r‖ in every layer; random is the mean of three seeds. The bias adapter always "
        "stays: k = 0 is the bias alone. The paper's Table 5 keeps or removes rank slices, which "
        "are the same directions in all layers, in one order for all examples. Selecting them "
        "separately in every layer and module is the stronger selection, so the two tables are not "
        "comparable.",
        markdown_table(record["rows"]),
        "Controls, with the whole adapter of another video and with no adapter:",
        markdown_table(_control_rows("condition", record["controls"])),
        _image("rank", "score against directions kept"),
    )


def _layers(record: Record, folder: Path) -> str:
    plot_layers(record, folder / "layers.png")
    controls = ", ".join(
        f"{interval_text(score)} with {name}" for name, score in record["controls"].items()
    )
    rows = [
        {"layer": row["layer"], "effect": row["effect"]}
        | {f"‖ΔW‖, {module}": norm for module, norm in row["norm"].items()}
        for row in record["rows"]
    ]
    return _section(
        "layers",
        "Layer removal",
        record,
        "S, the log-probability of the reference caption in nats per token, is "
        f"{interval_text(record['score'])} with the adapter, {controls}. The effect is S without "
        "one layer's generated update minus S with all updates, so it is negative where the update "
        "helps; the bias adapter stays. The norm is the mean ‖ΔW‖ of the generated updates "
        "(Frobenius norm, scale included).",
        markdown_table(rows),
        _image("layers", "effect of removal and update norm by layer"),
    )


def _logits(record: Record, folder: Path) -> str:
    plot_logits(record, folder / "logits.png")
    return _section(
        "logits",
        "Direct logit attribution",
        record,
        "The adapter's change to the residual stream after each layer, at the prompt's last token, "
        "projected on the unit vector of the mean output embedding of the reference caption's "
        "tokens; attention and mlp are the changes to the outputs of the layer's two blocks. The "
        "whole is the running sum of the parts. All captions share most of their words, so the "
        "direction is mostly that of any caption.",
        markdown_table(record["rows"]),
        _image("logits", "attribution by layer"),
    )


def _norms(record: Record, folder: Path) -> str:
    plot_norms(record, folder / "norms.png")
    rows = [
        {
            "module": module,
            "direction": side,
            "share of videos": ", ".join(f"{r} {share:.0%}" for r, share in norms[side].items()),
        }
        for module, norms in record["modules"].items()
        for side in ("largest", "smallest")
    ]
    return _section(
        "norms",
        "Update norms",
        record,
        "The direction with the largest or smallest norm product ‖A_r‖·‖B_r‖, averaged over "
        "layers:",
        markdown_table(rows),
        "Right: ‖ΔW‖ of the generated update (scale included) divided by ‖W‖ of the frozen weight:",
        _image("norms", "norm products by layer and direction, relative layer norms"),
    )


SECTIONS: Mapping[str, Callable[[Record, Path], str]] = {
    "limits": _limits,
    "table": _table,
    "chunks": _chunks,
    "efficiency": _efficiency,
    "sweep": _sweep,
    "rank": _rank,
    "layers": _layers,
    "logits": _logits,
    "norms": _norms,
}
