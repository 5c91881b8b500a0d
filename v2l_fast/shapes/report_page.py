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
from v2l_fast.shapes.probes import CAPTIONS_ONLY, NEVER_ASKED

Record = Mapping[str, Any]

INTRODUCTION = """# Results on the shapes world

The paper's measurements, repeated on `shapes`, the shipped pair for clips of 8 s, with videos of
moving colored shapes from the test split. (`shapes-any`, the default pair, was trained further.) No
training video shows the same combination of attributes, but every single object and all words of
the questions occur in training. The score of a
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
    source = f"`v2l shapes report --only {name}`: {record['videos']} videos, {record['machine']}."
    return "\n\n".join([f"## {title}", source, *parts]) + "\n"


def _image(name: str, text: str) -> str:
    return f"![{text}]({name}.png)"


def _limits(record: Record, folder: Path) -> str:
    return _section("limits", "What works and what does not", record, *probe_tables(record))


def probe_tables(record: Record) -> list[str]:
    """The record of :func:`v2l_fast.shapes.probes.probe` as text and tables, worst first."""

    def questions(rows: Sequence[Record], score: str) -> str:
        return markdown_table(
            [
                {
                    "questions about": row["kind"],
                    "n (videos)": f"{row['questions']} ({row['videos']})",
                    **{f"{score}, {name}": share for name, share in row["score"].items()},
                    **{f"kept, {name}": f"{kept:.2f}" for name, kept in row["kept"].items()},
                    **({"example": row["example"]} if "example" in row else {}),
                }
                for row in rows
            ]
        )

    def clips(rows: Sequence[Record], *columns: str) -> str:
        return markdown_table(
            [
                {
                    **{name: row[name] for name in columns},
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

    return [
        'What the pair should do and what it does, the farthest from its goal first. "Kept" is the '
        "share of the direct score above that of no adapter.",
        markdown_table(goal_rows(record)),
        "**Kinds of questions about clips of random duration** (2 to 64 s, 4 to 10 frames/s, 2 to "
        "12 frames). The hypernetwork of `shapes` was trained on clips of 8 s alone and neither on "
        "absent objects nor on places nor on which comes second; none was trained on another "
        "wording. A second network, where there is one, was trained on no question at all.",
        questions(record["kinds"], "correct"),
        "**Absent objects**: share of answers that deny the object.",
        questions(record["absent"], "denied"),
        "**Further kinds and wordings**, about clips of 8 s.",
        questions(record["further"], "correct"),
        "**Which of two objects a question refers to**: both are asked about by shape where their "
        "answers differ, so chance is 0.5.",
        questions(record["binding"], "correct"),
        "The same questions, answered from the models' own captions of the video.",
        questions(record["binding_captions"], "correct"),
        "**Three objects and other looks**, clips of 8 s: neither the VLM nor the hypernetwork was "
        "trained on what is held out.",
        clips(record["looks"], "group", "videos"),
        "**Detailed descriptions**: share of their statements that are true.",
        markdown_table([dict(record["descriptions"])]),
        "**Durations**: the same scenes slower or faster, sampled like files of that duration (4 "
        "frames/s; fewer frames below 8 s, so that two objects of a 2 s clip have one frame each, "
        "which shows no motion). Two questions per video, of every kind except binding.",
        clips(record["durations"], "seconds", "frames"),
        "The frames of the 8 s clip with the time stamps of another duration.",
        clips(record["restamped"], "seconds", "frames"),
    ]


def goal_rows(record: Record) -> list[dict[str, Any]]:
    """Each goal with its worst measured value, the farthest below its goal first."""

    def worst(rows: Sequence[Record], name: str) -> tuple[float, str]:
        return min((row["score"][name]["estimate"], row["kind"]) for row in rows)

    goals: list[tuple[str, float, float, str]] = []
    for part in ("captions", "questions"):
        value, seconds = min(
            (row[part]["difference"]["estimate"], row["seconds"]) for row in record["durations"]
        )
        name = f"{part} at any duration, adapter - direct"
        goals.append((name, -0.03, value, f"{seconds} s"))
    for name in (BASELINE, SYSTEM):
        goals.append(("absent objects denied, " + name, 0.9, *worst(record["absent"], name)))
    for name in (BASELINE, SYSTEM):
        goals.append(("which of two objects, " + name, 0.95, *worst(record["binding"], name)))
    asked = [row for row in record["kinds"] if row["kind"] not in NEVER_ASKED]
    lower, kind = min((row["score"]["difference"]["low"], row["kind"]) for row in asked)
    goals.append(("kinds of questions, lower bound of adapter - direct", -0.05, lower, kind))
    for name, row in record["retrieval"].items():
        label = f"the caption finds its own among {row['adapters']} adapters, {name}"
        goals.append((label, 0.9, row["first"]["estimate"], f"{row['captions']} captions"))
    shares = [(row["kept"].get(CAPTIONS_ONLY), row["kind"]) for row in record["kinds"]]
    if any(share is not None for share, _ in shares):
        kept, kind = min((share, kind) for share, kind in shares if share is not None)
        goals.append(("questions kept by the network trained on captions only", 0.8, kept, kind))
    goals.sort(key=lambda goal: goal[2] - goal[1])
    return [
        {
            "goal": name,
            "at least": f"{target:.2f}",
            "worst value": f"{value:.3f}",
            "where": where,
            "reached": "yes" if value >= target else "no",
        }
        for name, target, value, where in goals
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
