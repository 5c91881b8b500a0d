"""``v2l analyze ...`` and ``v2l sweep``: each writes a JSON record, its rows as CSV and a plot."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from v2l_fast.cli.options import (
    Base,
    Device,
    Dtype,
    ExactFrames,
    Force,
    Json,
    LongestEdge,
    Manifest,
    MaxFrames,
    MaxNewTokens,
    Model,
    Root,
    Split,
    check_text,
    load_model,
)
from v2l_fast.console import progress_bar, say, show_json, show_table

if TYPE_CHECKING:
    from v2l_fast.evaluation.examples import EvalExample, Progress
    from v2l_fast.hypernet.adapter import Adapter
    from v2l_fast.model import Video2LoRA
    from v2l_fast.video import Clip

app = typer.Typer(help="Look into adapters and what they cost.", no_args_is_help=True)

Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Folder of the results; runs/ANALYSIS if omitted."),
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Analyze only the first N videos; all if omitted.")
]


@app.command()
def effect(
    adapter: Annotated[Path, typer.Argument(help="Adapter file.")],
    question: Annotated[str, typer.Argument(help="Question to answer with and without it.")],
    model: Model = "shapes",
    base: Base = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Did the adapter do anything? Update norms, logit shift, both answers.

    \b
    v2l analyze effect clip.safetensors "What happens in the video?"
    """
    check_text(question)
    loaded = load_model(model, base, device, dtype)
    found = loaded.effect(loaded.load_adapter(adapter), question)
    if as_json:
        show_json(dataclasses.asdict(found))
        return
    rows = [
        (module, str(layer), f"{norm:.4g}", f"{relative:.2%}")
        for module, norms in found.update_norms.items()
        for layer, (norm, relative) in enumerate(
            zip(norms, found.relative_norms[module], strict=True)
        )
    ]
    show_table(("module", "layer", "update norm", "relative to the weight"), rows)
    say(
        f"first answer token: largest logit change {found.logit_shift:.3g}, "
        f"divergence {found.divergence:.3g} nats"
    )
    say(f"with the adapter:    {found.answer}")
    say(f"without the adapter: {found.answer_without}")


@app.command()
def norms(
    adapters: Annotated[list[Path], typer.Argument(help="Adapter files of one model.")],
    folder: Out = None,
    force: Force = False,
    model: Model = "shapes",
    base: Base = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Update norms by layer and rank direction, and how stable the directions' order is.

    \b
    v2l analyze norms adapters/*.safetensors --out runs/norms
    """
    _check("norms", folder, adapters, force)
    from v2l_fast.evaluation.ablations import adapter_norms
    from v2l_fast.evaluation.plots import plot_norms

    loaded = load_model(model, base, device, dtype)
    record = adapter_norms(loaded, [loaded.load_adapter(path) for path in adapters])
    rows = [
        {"module": module, "layer": layer, "norm": norm, "relative_norm": relative}
        for module, found in record["modules"].items()
        for layer, (norm, relative) in enumerate(
            zip(found["layer_norms"], found["relative_norms"], strict=True)
        )
    ]
    _write("norms", folder, record, rows, plot_norms, as_json)


@app.command()
def rank(
    manifest: Manifest,
    folder: Out = None,
    force: Force = False,
    budgets: Annotated[
        list[int] | None,
        typer.Option(
            "--keep",
            "-k",
            help="Directions to keep, repeatable; 1, 2, 4, 8 and 16 if omitted.",
            min=1,
        ),
    ] = None,
    root: Root = None,
    split: Split = None,
    limit: Limit = None,
    max_frames: MaxFrames = None,
    longest_edge: LongestEdge = None,
    exact_frames: ExactFrames = False,
    max_new_tokens: MaxNewTokens = 128,
    model: Model = "shapes",
    base: Base = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Token-F1 with some rank directions only: top, bottom, random, top removed (Table 5).

    \b
    v2l shapes render clips --count 64 && v2l analyze rank --manifest clips/manifest.jsonl
    """
    _check("rank", folder, [manifest], force)
    from v2l_fast.evaluation.ablations import BUDGETS, rank_ablation
    from v2l_fast.evaluation.metrics import token_f1
    from v2l_fast.evaluation.plots import plot_rank

    def run(
        loaded: Video2LoRA, examples: list[EvalExample], adapters: list[Adapter], bar: Progress
    ):
        return rank_ablation(
            loaded, examples, adapters, token_f1, budgets or BUDGETS,
            max_new_tokens=max_new_tokens, progress=bar,
        )  # fmt: skip

    reading = (manifest, root, split, limit, max_frames, longest_edge, exact_frames)
    record = _with_adapters(run, reading, (model, base, device, dtype))
    _write("rank", folder, record, record["rows"], plot_rank, as_json)


@app.command()
def layers(
    manifest: Manifest,
    folder: Out = None,
    force: Force = False,
    root: Root = None,
    split: Split = None,
    limit: Limit = None,
    max_frames: MaxFrames = None,
    longest_edge: LongestEdge = None,
    exact_frames: ExactFrames = False,
    model: Model = "shapes",
    base: Base = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Effect of removing one layer's update on the reference's likelihood, beside its norm
    (Figure 7).

    \b
    v2l analyze layers --manifest clips/manifest.jsonl --limit 16
    """
    _check("layers", folder, [manifest], force)
    from v2l_fast.evaluation.ablations import layer_removal
    from v2l_fast.evaluation.plots import plot_layers

    reading = (manifest, root, split, limit, max_frames, longest_edge, exact_frames)
    record = _with_adapters(layer_removal, reading, (model, base, device, dtype))
    _write("layers", folder, record, record["rows"], plot_layers, as_json)


@app.command()
def logits(
    manifest: Manifest,
    folder: Out = None,
    force: Force = False,
    root: Root = None,
    split: Split = None,
    limit: Limit = None,
    max_frames: MaxFrames = None,
    longest_edge: LongestEdge = None,
    exact_frames: ExactFrames = False,
    model: Model = "shapes",
    base: Base = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Direct logit attribution: where the adapter turns the residual stream towards the answer
    (Figure 8).

    \b
    v2l analyze logits --manifest clips/manifest.jsonl --limit 16
    """
    _check("logits", folder, [manifest], force)
    from v2l_fast.evaluation.ablations import logit_attribution
    from v2l_fast.evaluation.plots import plot_logits

    reading = (manifest, root, split, limit, max_frames, longest_edge, exact_frames)
    record = _with_adapters(logit_attribution, reading, (model, base, device, dtype))
    _write("logits", folder, record, record["rows"], plot_logits, as_json)


@app.command()
def chunks(
    manifest: Manifest,
    folder: Out = None,
    force: Force = False,
    counts: Annotated[
        list[int] | None,
        typer.Option(
            "--chunks",
            "-c",
            help="Number of chunks, repeatable; 1, 2, 4, 8 and 16 if omitted.",
            min=1,
        ),
    ] = None,
    root: Root = None,
    split: Split = None,
    limit: Limit = None,
    max_frames: Annotated[
        int | None, typer.Option(min=1, help="Frames of each chunk; as in training if omitted.")
    ] = None,
    longest_edge: LongestEdge = None,
    exact_frames: ExactFrames = False,
    max_new_tokens: MaxNewTokens = 128,
    model: Model = "shapes",
    base: Base = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Token-F1 through adapters composed of a video's chunks, against the single adapter
    (Section 5.6).

    \b
    v2l analyze chunks --manifest clips/manifest.jsonl -c 1 -c 2 -c 8
    """
    _check("chunks", folder, [manifest], force)
    from v2l_fast.evaluation.ablations import COUNTS, compare_chunks
    from v2l_fast.evaluation.examples import manifest_examples
    from v2l_fast.evaluation.metrics import token_f1
    from v2l_fast.evaluation.plots import plot_chunks

    examples = manifest_examples(manifest, None, root, split, limit)
    loaded = load_model(model, base, device, dtype)
    with progress_bar("analyzing") as progress:
        record = compare_chunks(
            loaded,
            examples,
            token_f1,
            counts or COUNTS,
            max_new_tokens,
            progress,
            max_frames=max_frames,
            longest_edge=longest_edge,
            exact_frames=exact_frames,
        )
    trained = "told of chunks" if record["chunk_position"] else "zero-shot"
    _write(
        "chunks", folder, record, record["rows"],
        lambda found, path: plot_chunks({trained: found}, path), as_json,
    )  # fmt: skip


@app.command()
def efficiency(
    manifest: Manifest,
    folder: Out = None,
    force: Force = False,
    repeats: Annotated[int, typer.Option(help="Timings of each question.", min=1)] = 3,
    keep: Annotated[
        float, typer.Option(help="Share of the visual tokens that FrameFusion keeps.")
    ] = 0.25,
    root: Root = None,
    split: Split = None,
    limit: Limit = None,
    max_frames: Annotated[
        list[int] | None,
        typer.Option(help="Frames to sample, repeatable; as in training if omitted.", min=1),
    ] = None,
    longest_edge: Annotated[
        list[int] | None,
        typer.Option(help="Longest frame edge, repeatable; as in training if omitted.", min=2),
    ] = None,
    exact_frames: ExactFrames = False,
    max_new_tokens: MaxNewTokens = 128,
    model: Model = "shapes",
    base: Base = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Direct inference, caches, FrameFusion (our implementation) and adapters: first token,
    preparation, bytes stored, token-F1 and break-even (Figure 2).

    Several frame counts or edges also give budgets.png, all of it by visual tokens (Figure 4).

    \b
    v2l analyze efficiency --manifest clips/manifest.jsonl --limit 16
    v2l analyze efficiency --manifest vdc.jsonl --exact-frames --max-frames 8 --max-frames 128
    """
    _check("efficiency", folder, [manifest], force)
    from v2l_fast.evaluation.efficiency import compare_budgets
    from v2l_fast.evaluation.examples import manifest_examples
    from v2l_fast.evaluation.framefusion import FrameFusion
    from v2l_fast.evaluation.methods import MethodSettings
    from v2l_fast.evaluation.metrics import token_f1
    from v2l_fast.evaluation.plots import plot_amortized, plot_budgets

    def draw(found: Mapping[str, Any], path: Path) -> None:
        plot_amortized(found["budgets"][0], path)
        if len(found["budgets"]) > 1:
            plot_budgets(found["budgets"], path.with_name("budgets.png"))

    fusion = FrameFusion(keep)
    examples = manifest_examples(manifest, None, root, split, limit)
    loaded = load_model(model, base, device, dtype)
    setting = MethodSettings(
        loaded, exact_frames=exact_frames, max_new_tokens=max_new_tokens, fusion=fusion
    )
    budgets = itertools.product(max_frames or [None], longest_edge or [None])
    with progress_bar("analyzing") as progress:
        record = compare_budgets(setting, examples, token_f1, budgets, repeats, progress)
    shared = ("frames", "longest_edge", "visual_tokens")
    rows = [
        {name: budget[name] for name in shared} | row
        for budget in record["budgets"]
        for row in budget["rows"]
    ]
    _write("efficiency", folder, record, rows, draw, as_json)


def sweep(
    manifest: Manifest,
    folder: Out = None,
    force: Force = False,
    frames: Annotated[
        list[int] | None,
        typer.Option(
            "--frames", "-f", help="Exact frames, repeatable; 8 to 1024 if omitted.", min=1
        ),
    ] = None,
    resolutions: Annotated[
        list[int] | None,
        typer.Option(
            "--resolution",
            "-r",
            help="Longest frame edge in pixels, repeatable; 224 to 1024 if omitted.",
            min=2,
        ),
    ] = None,
    root: Root = None,
    split: Split = None,
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = 128,
    model: Model = "shapes",
    base: Base = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Adapter against direct inference over frames x resolution (Figure 3).

    Takes exactly so many frames: a video that holds fewer is left out of the cell, by name. Repeat
    the same command to continue after an interruption. Every cell is a row of few columns here; its
    other measurements are in the JSON and CSV files.

    \b
    v2l sweep --manifest clips/manifest.jsonl --limit 8 -f 8 -f 16 -f 32 -r 48 -r 96
    v2l sweep --manifest vdc.jsonl --model hypernet-500m/ --out runs/sweep-500m
    """
    from v2l_fast.evaluation.examples import manifest_examples
    from v2l_fast.evaluation.metrics import token_f1
    from v2l_fast.evaluation.plots import plot_sweep
    from v2l_fast.evaluation.sweep import COLUMNS, FRAMES, RESOLUTIONS
    from v2l_fast.evaluation.sweep import sweep as run
    from v2l_fast.video import FrameSampling

    folder = folder or Path("runs/sweep")
    # The cells make it an earlier run of this command, which continues.
    _check("sweep", folder, [manifest], force or (folder / "cells").is_dir())
    for edge in resolutions or ():
        FrameSampling(1, edge)
    examples = manifest_examples(manifest, None, root, split, limit)
    loaded = load_model(model, base, device, dtype)
    with progress_bar("analyzing") as progress:
        record = run(
            loaded,
            examples,
            token_f1,
            folder / "cells",
            frames or FRAMES,
            resolutions or RESOLUTIONS,
            max_new_tokens,
            progress,
        )
    _write("sweep", folder, record, record["rows"], plot_sweep, as_json, COLUMNS)


# --- shared by the commands ---------------------------------------------------------------------


def _with_adapters(
    run: Callable[..., dict[str, Any]], reading: tuple, loading: tuple
) -> dict[str, Any]:
    """Read a manifest, internalize its videos and analyze the adapters."""
    from v2l_fast.evaluation.examples import internalize_each, manifest_examples
    from v2l_fast.video import load_spans

    manifest, root, split, limit, max_frames, longest_edge, exact_frames = reading
    loaded = load_model(*loading)
    chosen = loaded.config.sampling.override(max_frames, longest_edge)
    sampling = {
        "max_frames": chosen.max_frames,
        "longest_edge": chosen.longest_edge,
        "exact_frames": exact_frames,
    }

    def read_span(path: str, span: tuple[float, float]) -> Clip:
        return load_spans(path, span, 1, target_fps=chosen.target_fps, **sampling)[0]

    examples = manifest_examples(manifest, read_span, root, split, limit)
    with progress_bar("analyzing") as progress:
        adapters = internalize_each(loaded, examples, progress, **sampling)
        return run(loaded, examples, adapters, progress)


def _check(name: str, folder: Path | None, inputs: list[Path], force: bool) -> None:
    """Refuse the results' folder before the work begins."""
    from v2l_fast.outputs import check_folder

    names = [f"{name}.{ending}" for ending in ("json", "csv", "png")]
    check_folder(folder or Path("runs") / name, names, inputs, force)


def _write(
    name: str,
    folder: Path | None,
    record: Mapping[str, Any],
    rows: list[dict[str, Any]],
    plot: Callable[[Mapping[str, Any], Path], None],
    as_json: bool,
    shown: Mapping[str, str] | None = None,
) -> None:
    """Write ``name``.json, .csv and .png; print the record, or the rows.

    Args:
        shown: field of a row -> its heading, for tables that show a part of the fields.
    """
    from v2l_fast.evaluation.tables import columns, write_csv
    from v2l_fast.files import write_json

    folder = folder or Path("runs") / name
    write_json(folder / f"{name}.json", record)
    write_csv(folder / f"{name}.csv", rows)
    plot(record, folder / f"{name}.png")
    if as_json:
        show_json(record)
        return
    texts = columns([row for row in rows if shown is None or "failed" not in row])
    headings = {field: field for field in texts} if shown is None else dict(shown)
    failures = [row for row in rows if shown is not None and "failed" in row]
    absent = ["-"] * len(next(iter(texts.values()), []))
    cells = [texts.get(field, absent) for field in headings]
    # A column without a single value is noise.
    filled = [not all(text == "-" for text in column) for column in cells]
    kept = [
        (heading, column)
        for heading, column, keep in zip(headings.values(), cells, filled, strict=True)
        if keep
    ]
    show_table(
        [heading for heading, _ in kept], list(zip(*(column for _, column in kept), strict=True))
    )
    for row in failures:
        say(f"{row['frames']} frames, {row['longest_edge']} px: {row['failed']}")
    say(f"{folder / name}.json, .csv, .png")
