"""The report's records as one Markdown page with plots."""

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
from v2l_fast.evaluation.tables import interval_text, markdown
from v2l_fast.files import write_text

Record = Mapping[str, Any]

INTRODUCTION = """# Results on the shapes world

What the paper measures, measured on the small pair that ships with the package: videos of moving
colored shapes from the test split. No training video shows the same combination of attributes, but
training shows every object by itself, and every question's words. Captions score the share of the
scene's attributes they state rightly, questions exact match, unless a table says otherwise; the
first two sections pool the attributes of all videos, elsewhere every caption counts the same. The
worst numbers come first.

Brackets are 95% intervals over videos: percentile bootstrap, below 100 videos united with an exact
interval at the effective number of videos; where no video differs from another, as wide as so many
videos leave open. The page prints several hundred of them, each at 95% on its own: some miss.
Layers and directions count from 0. Times are this machine's CPU at toy model sizes: they compare
methods with each other, and say little about real models.

`v2l shapes report` makes the page; `--only NAME` measures one piece of it. `v2l evaluate`,
`v2l analyze` and `v2l sweep` do the same for any model and any manifest.
"""


# What the page's folder holds.
FILES = ("README.md",) + tuple(
    f"{name}.png"
    for name in (
        "conditions", "chunks", "amortized", "budgets", "sweep", "rank", "layers", "logits", "norms"
    )
)  # fmt: skip


def write_page(records: Mapping[str, Record], folder: Path) -> Path:
    """Write ``README.md`` and its plots into ``folder``; pieces that are not there are left out."""
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
    """The probes of :func:`v2l_fast.shapes.probes.probe` as text and tables, worst first."""

    def questions(rows: Sequence[Record], score: str) -> str:
        return markdown(
            [
                {
                    "questions about": row["kind"],
                    "n (videos)": f"{row['questions']} ({row['videos']})",
                    **{f"{score}, {name}": found for name, found in row["score"].items()},
                    **({"example": row["example"]} if "example" in row else {}),
                }
                for row in rows
            ]
        )

    def durations(rows: Sequence[Record]) -> str:
        return markdown(
            [
                {
                    "seconds": row["seconds"],
                    "frames": row["frames"],
                    **{f"captions, {name}": found for name, found in row["captions"].items()},
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
        "**Absent things are not denied.** Asked about a shape that no object has, or about the "
        "second object of one, both models name an attribute all the same (the lowest share of a "
        f"kind is {lowest[BASELINE]:.3f} direct, {lowest[SYSTEM]:.3f} by adapter). Neither model "
        'was trained to say "none". Scored: answers that deny.',
        questions(record["absent"], "denied"),
        "**Kinds of questions that the hypernetwork was not trained on are mostly not answered**, "
        "though the VLM answers most of them with the video in context.",
        questions(record["untrained"], "right"),
        "**Which object is meant is not learned.** In a video of two objects both are asked about "
        "by shape where their answers differ, so chance is 0.5, with the video in context as by "
        "its adapter.",
        questions(record["binding"], "right"),
        "Both models know: the same questions, answered from what their own caption of the video "
        "says.",
        questions(record["binding_captions"], "right"),
        "**Clips that do not last 8 seconds**, as every training clip does: the same scenes slower "
        "or faster, sampled as files of that duration are (4 frames/s; below 8 s there are fewer "
        "frames). Two questions a video of every kind but binding.",
        durations(record["durations"]),
        "What breaks is the time in the prompt: the very frames of the 8 s clip, with time stamps "
        "of another duration.",
        durations(record["restamped"]),
    ]


def _table(record: Record, folder: Path) -> str:
    shares = {
        "attributes stated rightly": record["attributes"],
        "captions right to the word": record["caption_exact"],
    }
    plot_conditions(shares, folder / "conditions.png")
    rows = [
        {"condition": name, **{measure: found[name] for measure, found in shares.items()}}
        for name in record["attributes"]
    ]
    files = [
        {"condition, source": name, "attributes stated rightly": share}
        for name, share in record["encoded_files"].items()
        if isinstance(share, Mapping)
    ]
    return _section(
        "table",
        "Direct, adapter and controls",
        record,
        markdown(rows),
        _image("conditions", "shares stated rightly by condition"),
        record["table"].strip(),
        f"The same scenes as H.264 files, {record['encoded_files']['videos']} of them:",
        markdown(files),
    )


def _chunks(record: Record, folder: Path) -> str:
    plot_chunks(record["networks"], folder / "chunks.png")
    parts = []
    for name, found in record["networks"].items():
        rows = [
            {
                "chunks": row["chunks"],
                "rank": row["rank"],
                **{
                    kind: f"{share['estimate']:.3f}" + _kept(row, kind)
                    for kind, share in row["score"].items()
                },
            }
            for row in found["rows"]
        ]
        rows += [
            {"chunks": control, "rank": None}
            | {kind: f"{share['estimate']:.3f}" for kind, share in scores.items()}
            for control, scores in found["controls"].items()
        ]
        parts += [f"**{name}**", markdown(rows)]
    return _section(
        "chunks",
        "Chunk composition",
        record,
        "Each chunk is internalized on its own; adapters are joined in rank, the bias adapter "
        "once. In parentheses what is kept of the single adapter's score above that without an "
        "adapter; the goal is 95% at 8 chunks. Training on chunks goes up to 8 of them.",
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
    for found in budgets:
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
            for row in found["rows"]
        ]
        rows += _control_rows("method", found["controls"])
        parts += [
            f"**{found['frames']} frames, {found['longest_edge']} px, "
            f"{found['visual_tokens']:.0f} visual tokens**",
            markdown(rows),
        ]
    first = budgets[0]
    return _section(
        "efficiency",
        "Efficiency",
        record,
        f"{first['questions']} questions, {first['questions_per_video']:.0f} a video, one at a "
        "time. Direct inference decodes and encodes the file for every question; all others once, "
        "as preparation. A method that prepares in P seconds and answers in q breaks even with "
        "direct inference at d seconds a question at the first n with P + n·q < n·d; on average it "
        f"costs P / n + q at n = {first['questions_per_video']:.0f}. First tokens are medians over "
        "questions, preparations over videos. FrameFusion is our own implementation of its "
        f"authors' rules, keeping {first['keep']:.0%} of the visual tokens; merged and pruned are "
        "the tokens it takes away. Alone it reduces anew for every question, and the question's "
        "last token decides what is pruned; reused, the last token of the video's prompt does. "
        '"Tokens as direct" is the share of answers that equal direct inference\'s.',
        *parts,
        f"At {first['frames']} frames, {first['longest_edge']} px:",
        _image("amortized", "cost a question against questions a video"),
        "All of them; a line that cannot be seen lies under another:",
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
        "The frames asked for are the frames encoded. The pair was trained with 8 frames of 48 "
        "pixels: every other cell is outside what both models have seen. The change is adapter - "
        "direct. First tokens are timed from decoded frames, so direct inference does not pay for "
        "decoding here, as it does in the efficiency comparison. Peak memory is the whole "
        "process's.",
        markdown(rows),
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
        "Attribute accuracy of captions with k of the adapter's directions, chosen by "
        "‖A_r‖·‖B_r‖ in every layer; random is the mean of three seeds. The bias adapter always "
        "stays: k = 0 is the bias alone. The paper's Table 5 keeps or removes rank slices, the "
        "same directions in all layers, in one order that holds for every example; choosing them "
        "anew in every layer and module is the stronger selection, so the tables do not compare.",
        markdown(record["rows"]),
        "Controls, the whole adapter of another video and none at all:",
        markdown(_control_rows("condition", record["controls"])),
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
        "S, the log-probability of the reference caption in nats a token, is "
        f"{interval_text(record['score'])} with the adapter, {controls}. Effect is S without one "
        "layer's generated update - S with all of them: negative where the update helps; the bias "
        "adapter stays. The norm is the mean ‖ΔW‖ of the generated updates (Frobenius, their scale "
        "included).",
        markdown(rows),
        _image("layers", "effect of removal and update norm by layer"),
    )


def _logits(record: Record, folder: Path) -> str:
    plot_logits(record, folder / "logits.png")
    return _section(
        "logits",
        "Direct logit attribution",
        record,
        "What the adapter changes in the residual stream behind each layer, at the prompt's last "
        "token, projected on the direction (of length one) of the mean output embedding of the "
        "reference caption's tokens; attention and mlp are what the layer's own two parts change. "
        "The whole is the running sum of the parts. All captions share most of their words, so "
        "the direction is mostly that of any caption.",
        markdown(record["rows"]),
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
        "Which direction has the largest or smallest norm product ‖A_r‖·‖B_r‖, averaged over "
        "layers:",
        markdown(rows),
        "Right, ‖ΔW‖ of the generated update (its scale included) over the frozen weight's ‖W‖:",
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
