"""``v2l evaluate`` and ``manifest``: a model on a manifest, a published benchmark as one. Also
``v2l analyze ...`` and ``v2l sweep``: each writes a JSON record, its rows as CSV and a plot."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer import Argument, Option

from v2l_fast.cli.options import (
    CONTEXT,
    EXACT_FRAMES,
    FORCE,
    JSON,
    MAX_NEW_TOKENS,
    SEED,
    ExampleOptions,
    FrameOptions,
    ModelOptions,
    check_text,
    options,
    output_file,
    with_options,
)
from v2l_fast.console import progress_bar, say, show, show_json, show_table

if TYPE_CHECKING:
    from v2l_fast.evaluation.examples import EvalExample
    from v2l_fast.evaluation.judge import Judge
    from v2l_fast.video import Clip


@options("Judge")
class JudgeOptions:
    """A language model that scores the answers."""

    judge: str | None = Option(
        None, help="OpenAI-compatible API, such as http://localhost:8000/v1."
    )
    judge_model: str = Option(
        "Qwen/Qwen3-VL-30B-A3B-Thinking-FP8",
        help="Name that the judge is served under. By default, the paper's.",
    )
    judge_pairs: bool = Option(False, "--judge-pairs", help="Also judge both answers side by side.")
    judge_tokens: int = Option(
        1024, min=1, help="Maximum tokens of a reply, including its thoughts."
    )
    judge_workers: int = Option(8, min=1, help="Concurrent requests.")
    judge_json: bool = Option(
        True, help="Ask the judge's server for JSON, which some do not support."
    )
    judge_prices: tuple[float, float] = Option(
        (0.0, 0.0), help="Dollars per million input and output tokens."
    )

    def create(self, cache: Path) -> Judge | None:
        """The judge, if there is one; its judgments are kept in a file."""
        from v2l_fast.evaluation.judge import Judge, JudgeSettings

        if self.judge is None:
            return None
        settings = JudgeSettings(
            self.judge,
            self.judge_model,
            max_tokens=self.judge_tokens,
            workers=self.judge_workers,
            json_mode=self.judge_json,
            prices=self.judge_prices,
        )
        return Judge(settings, cache)


@with_options
def evaluate(
    source: ExampleOptions,
    frames: FrameOptions,
    loading: ModelOptions,
    judging: JudgeOptions,
    folder: Path | None = Option(
        None, "--out", "-o", help="Folder of the results. By default, runs/evaluate-MANIFEST."
    ),
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch: int = Option(16, min=1, help="Examples answered together."),
    as_json: bool = JSON,
) -> None:
    """Compare the video in context with its adapter, and with controls, on a manifest.

    All conditions see the same videos, prompts and frames and answer greedily. Repeat the same
    command to continue after an interruption.

    \b
    v2l shapes render clips --count 64 && v2l evaluate --manifest clips/manifest.jsonl
    v2l evaluate --manifest vdc.jsonl --model hypernet-500m/ --judge http://localhost:8000/v1
    """
    from v2l_fast.data.manifest import load_manifest
    from v2l_fast.data.readers import ClipReader
    from v2l_fast.evaluation.answers import AnswerSettings
    from v2l_fast.evaluation.evaluate import evaluate as run
    from v2l_fast.outputs import check_folder

    folder = folder or Path("runs") / f"evaluate-{source.manifest.stem}"
    check_folder(folder)
    examples = load_manifest(source.manifest, source.root, source.split)
    judge = judging.create(folder / "judgments.jsonl")
    model = loading.load()
    sampling = frames.override(model.config.sampling)
    reader = ClipReader(sampling, seconds=600.0)
    with progress_bar("evaluating") as progress:
        result = run(
            model,
            examples,
            AnswerSettings(sampling, max_new_tokens),
            load=lambda video: reader.read(video)[0],
            folder=folder,
            judge=judge,
            pairs=judging.judge_pairs,
            batch=batch,
            progress=progress,
        )
    if as_json:
        show_json(result.record)
        return
    show(result.table)
    for path in result.files:
        say(str(path))


def manifest(
    benchmark: str = Argument(
        ...,
        help="activitynet-captions, plm-rdcap, plm-rcap, vdc, carebench, nextqa, "
        "activitynet-qa, plm-sgqa or vidcapbench.",
    ),
    folder: Path = Argument(
        ..., help="Folder with the annotation files and, anywhere in it, videos."
    ),
    out_path: Path = Option(
        ..., "--out", "-o", help="The manifest (JSON lines).", parser=output_file
    ),
    limit: int | None = Option(
        None,
        min=0,
        help="Examples of each subset (videos of vidcapbench); 0 for all. By default, the "
        "paper's number: 500 (100).",
    ),
    seed: int = SEED,
    skip_missing: bool = Option(
        False, "--skip-missing", help="Leave out examples whose video is missing."
    ),
    force: bool = FORCE,
    as_json: bool = JSON,
) -> None:
    """Write the manifest of a published benchmark from its files.

    \b
    v2l manifest vdc data/vdc --out data/vdc.jsonl
    v2l manifest activitynet-qa data/anet --out anet-qa.jsonl --skip-missing
    """
    from v2l_fast.evaluation.benchmark_manifests import build
    from v2l_fast.outputs import check_output

    check_output(out_path, force=force)
    result = build(benchmark, folder, out_path, limit, seed, skip_missing)
    if as_json:
        show_json(
            {
                "manifest": str(out_path),
                "examples": result.examples,
                "videos": result.videos,
                "missing": list(result.missing),
            }
        )
        return
    left_out = f", {len(result.missing)} videos are missing" if result.missing else ""
    say(f"{out_path}: {result.examples} examples about {result.videos} videos{left_out}")


# --- analyze --------------------------------------------------------------------------------------

analyze_app = typer.Typer(
    help="Analyze adapters, and measure what they cost.",
    no_args_is_help=True,
    context_settings=CONTEXT,
)


@options("Manifest")
class AnalyzedOptions(ExampleOptions):
    """The examples that an analysis takes."""

    limit: int | None = Option(None, min=1, help="Use only the first N videos.")

    def examples(self, read_span: Callable[..., Clip] | None = None) -> list[EvalExample]:
        """See :func:`v2l_fast.evaluation.examples.manifest_examples`."""
        from v2l_fast.evaluation.examples import manifest_examples

        return manifest_examples(self.manifest, read_span, self.root, self.split, self.limit)


@options("Results")
class ResultOptions:
    """Where results are written."""

    out: Path | None = Option(
        None, "--out", "-o", help="Folder of the results. By default, runs/ANALYSIS."
    )
    force: bool = FORCE
    as_json: bool = JSON

    def folder(self, name: str) -> Path:
        """The folder of an analysis."""
        return self.out or Path("runs") / name

    def check(self, name: str, inputs: Sequence[Path], force: bool = False) -> None:
        """Refuse the folder of an analysis before the work begins."""
        from v2l_fast.outputs import check_folder

        names = [f"{name}.{suffix}" for suffix in ("json", "csv", "png")]
        check_folder(self.folder(name), names, inputs, force or self.force)

    def write(
        self,
        name: str,
        record: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]],
        plot: Callable[[Mapping[str, Any], Path], None],
        headings: Mapping[str, str] | None = None,
    ) -> None:
        """Write ``name``.json, .csv and .png; print the record, or the rows.

        Args:
            headings: field -> heading, for a table of these fields only. Rows that failed are
                listed below it.
        """
        from v2l_fast.evaluation.report import table_columns, write_csv
        from v2l_fast.files import write_json

        path = self.folder(name) / name
        write_json(f"{path}.json", record)
        write_csv(path.with_name(f"{name}.csv"), rows)
        plot(record, path.with_name(f"{name}.png"))
        if self.as_json:
            show_json(record)
            return
        failures = [row for row in rows if headings is not None and "failed" in row]
        texts = table_columns([row for row in rows if headings is None or "failed" not in row])
        fields = {field: field for field in texts} if headings is None else headings
        # A column without a single value is noise.
        table = {
            heading: texts[field]
            for field, heading in fields.items()
            if set(texts.get(field, "-")) != {"-"}
        }
        show_table(list(table), list(zip(*table.values(), strict=True)))
        for row in failures:
            say(f"{row['frames']} frames, {row['longest_edge']} px: {row['failed']}")
        say(f"{path}.json, .csv, .png")


@analyze_app.command()
@with_options
def effect(
    loading: ModelOptions,
    file: Path = Argument(..., metavar="ADAPTER", help="Adapter file."),
    question: str = Argument(..., help="Question to answer with and without it."),
    as_json: bool = JSON,
) -> None:
    """Did the adapter do anything? Update norms, logit shift, both answers.

    \b
    v2l analyze effect clip.safetensors "What happens in the video?"
    """
    check_text(question)
    model = loading.load(compile=False)
    result = model.effect(model.load_adapter(file), question)
    if as_json:
        show_json(asdict(result))
        return
    rows = [
        (module, str(layer), f"{norm:.4g}", f"{relative:.2%}")
        for module, by_layer in result.update_norms.items()
        for layer, (norm, relative) in enumerate(
            zip(by_layer, result.relative_norms[module], strict=True)
        )
    ]
    show_table(("module", "layer", "update norm", "relative to the weight"), rows)
    say(
        f"first answer token: largest logit change {result.logit_shift:.3g}, "
        f"divergence {result.divergence:.3g} nats"
    )
    say(f"with the adapter:    {result.answer}")
    say(f"without the adapter: {result.answer_without}")


@analyze_app.command()
@with_options
def norms(
    loading: ModelOptions,
    results: ResultOptions,
    files: list[Path] = Argument(..., metavar="ADAPTER...", help="Adapter files of one model."),
) -> None:
    """Update norms by layer and rank direction, and how stable the directions' order is.

    \b
    v2l analyze norms adapters/*.safetensors --out runs/norms
    """
    results.check("norms", files)
    from v2l_fast.evaluation.ablations import adapter_norms
    from v2l_fast.evaluation.plots import plot_norms

    model = loading.load(compile=False)
    record = adapter_norms(model, [model.load_adapter(path) for path in files])
    rows = [
        {"module": module, "layer": layer, "norm": norm, "relative_norm": relative}
        for module, by_layer in record["modules"].items()
        for layer, (norm, relative) in enumerate(
            zip(by_layer["layer_norms"], by_layer["relative_norms"], strict=True)
        )
    ]
    results.write("norms", record, rows, plot_norms)


@analyze_app.command()
@with_options
def rank(
    source: AnalyzedOptions,
    frames: FrameOptions,
    loading: ModelOptions,
    results: ResultOptions,
    budgets: list[int] | None = Option(
        None,
        "--keep",
        "-k",
        help="Directions to keep, repeatable. By default, 1, 2, 4, 8 and 16.",
        min=1,
    ),
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> None:
    """Token-F1 with some rank directions only: top, bottom, random, top removed (Table 5).

    \b
    v2l shapes render clips --count 64 && v2l analyze rank --manifest clips/manifest.jsonl
    """
    results.check("rank", [source.manifest])
    from v2l_fast.evaluation.ablations import BUDGETS, rank_ablation
    from v2l_fast.evaluation.examples import token_f1
    from v2l_fast.evaluation.plots import plot_rank

    record = _analyze_adapters(
        partial(
            rank_ablation,
            metric=token_f1,
            budgets=budgets or BUDGETS,
            max_new_tokens=max_new_tokens,
        ),
        source, frames, loading,
    )  # fmt: skip
    results.write("rank", record, record["rows"], plot_rank)


@analyze_app.command()
@with_options
def layers(
    source: AnalyzedOptions, frames: FrameOptions, loading: ModelOptions, results: ResultOptions
) -> None:
    """Effect of removing one layer's update on the reference's likelihood, beside its norm
    (Figure 7).

    \b
    v2l analyze layers --manifest clips/manifest.jsonl --limit 16
    """
    results.check("layers", [source.manifest])
    from v2l_fast.evaluation.ablations import layer_removal
    from v2l_fast.evaluation.plots import plot_layers

    record = _analyze_adapters(layer_removal, source, frames, loading)
    results.write("layers", record, record["rows"], plot_layers)


@analyze_app.command()
@with_options
def logits(
    source: AnalyzedOptions, frames: FrameOptions, loading: ModelOptions, results: ResultOptions
) -> None:
    """Direct logit attribution: where the adapter turns the residual stream towards the answer
    (Figure 8).

    \b
    v2l analyze logits --manifest clips/manifest.jsonl --limit 16
    """
    results.check("logits", [source.manifest])
    from v2l_fast.evaluation.ablations import logit_attribution
    from v2l_fast.evaluation.plots import plot_logits

    record = _analyze_adapters(logit_attribution, source, frames, loading)
    results.write("logits", record, record["rows"], plot_logits)


@analyze_app.command()
@with_options
def chunks(
    source: AnalyzedOptions,
    frames: FrameOptions,
    loading: ModelOptions,
    results: ResultOptions,
    counts: list[int] | None = Option(
        None,
        "--chunks",
        "-c",
        help="Number of chunks, repeatable. By default, 1, 2, 4, 8 and 16.",
        min=1,
    ),
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> None:
    """Token-F1 through adapters composed of a video's chunks, against the single adapter
    (Section 5.6).

    --max-frames is the number of frames of each chunk.

    \b
    v2l analyze chunks --manifest clips/manifest.jsonl -c 1 -c 2 -c 8
    """
    results.check("chunks", [source.manifest])
    from v2l_fast.evaluation.ablations import COUNTS, compare_chunks
    from v2l_fast.evaluation.examples import token_f1
    from v2l_fast.evaluation.plots import plot_chunks

    examples = source.examples()
    model = loading.load()
    with progress_bar("analyzing") as progress:
        record = compare_chunks(
            model,
            examples,
            token_f1,
            counts or COUNTS,
            max_new_tokens,
            progress,
            sampling=frames.override(model.config.sampling),
        )
    name = "trained on chunks" if record["chunk_position"] else "zero-shot"
    results.write(
        "chunks", record, record["rows"], lambda record, path: plot_chunks({name: record}, path)
    )


@analyze_app.command()
@with_options
def efficiency(
    source: AnalyzedOptions,
    loading: ModelOptions,
    results: ResultOptions,
    repeats: int = Option(3, help="Number of timings of each question.", min=1),
    keep: float = Option(0.25, help="Share of the visual tokens that FrameFusion keeps."),
    max_frames: list[int] | None = Option(
        None, help="Maximum number of frames, repeatable. By default, as in training.", min=1
    ),
    longest_edge: list[int] | None = Option(
        None, help="Longest frame edge, repeatable. By default, as in training.", min=2
    ),
    exact_frames: bool = EXACT_FRAMES,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> None:
    """Direct inference, caches, FrameFusion (our implementation) and adapters: first token,
    preparation, bytes stored, token-F1 and break-even (Figure 2).

    Several frame counts or edges also give budgets.png: the same by visual tokens (Figure 4).

    \b
    v2l analyze efficiency --manifest clips/manifest.jsonl --limit 16
    v2l analyze efficiency --manifest vdc.jsonl --exact-frames --max-frames 8 --max-frames 128
    """
    results.check("efficiency", [source.manifest])
    from v2l_fast.evaluation.efficiency import compare_budgets
    from v2l_fast.evaluation.examples import token_f1
    from v2l_fast.evaluation.methods import FrameFusion, MethodSettings
    from v2l_fast.evaluation.plots import plot_amortized, plot_budgets

    def draw(record: Mapping[str, Any], path: Path) -> None:
        plot_amortized(record["budgets"][0], path)
        if len(record["budgets"]) > 1:
            plot_budgets(record["budgets"], path.with_name("budgets.png"))

    fusion = FrameFusion(keep)
    examples = source.examples()
    model = loading.load()
    sampling = model.config.sampling.override(exact_frames=exact_frames)
    setting = MethodSettings(model, sampling, max_new_tokens, fusion)
    budgets = itertools.product(max_frames or [None], longest_edge or [None])
    with progress_bar("analyzing") as progress:
        record = compare_budgets(setting, examples, token_f1, budgets, repeats, progress)
    shared = ("frames", "longest_edge", "visual_tokens")
    rows = [
        {name: budget[name] for name in shared} | row
        for budget in record["budgets"]
        for row in budget["rows"]
    ]
    results.write("efficiency", record, rows, draw)


@with_options
def sweep(
    source: AnalyzedOptions,
    loading: ModelOptions,
    results: ResultOptions,
    frames: list[int] | None = Option(
        None, "--frames", "-f", help="Exact frames, repeatable. By default, 8 to 1024.", min=1
    ),
    resolutions: list[int] | None = Option(
        None,
        "--resolution",
        "-r",
        help="Longest frame edge in pixels, repeatable. By default, 224 to 1024.",
        min=2,
    ),
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> None:
    """Adapter against direct inference over frames x resolution (Figure 3).

    Every cell takes exactly its number of frames, and lists the videos that hold fewer. Repeat the
    same command to continue after an interruption. The table has a row of few columns for each
    cell; all measurements are in the JSON and CSV files.

    \b
    v2l sweep --manifest clips/manifest.jsonl --limit 8 -f 8 -f 16 -f 32 -r 48 -r 96
    v2l sweep --manifest vdc.jsonl --model hypernet-500m/ --out runs/sweep-500m
    """
    from v2l_fast.evaluation.efficiency import COLUMNS, FRAMES, RESOLUTIONS
    from v2l_fast.evaluation.efficiency import sweep as run
    from v2l_fast.evaluation.examples import token_f1
    from v2l_fast.evaluation.plots import plot_sweep
    from v2l_fast.video import FrameSampling

    cells = results.folder("sweep") / "cells"
    # With cells it is an earlier run of this command, which continues.
    results.check("sweep", [source.manifest], force=cells.is_dir())
    for edge in resolutions or ():
        FrameSampling(1, edge)
    examples = source.examples()
    model = loading.load()
    with progress_bar("analyzing") as progress:
        record = run(
            model, examples, token_f1, cells, frames or FRAMES, resolutions or RESOLUTIONS,
            max_new_tokens, progress,
        )  # fmt: skip
    results.write("sweep", record, record["rows"], plot_sweep, COLUMNS)


def _analyze_adapters(
    analyze: Callable[..., dict[str, Any]],
    source: AnalyzedOptions,
    frames: FrameOptions,
    loading: ModelOptions,
) -> dict[str, Any]:
    """Internalize the videos of a manifest and analyze their adapters."""
    from v2l_fast.evaluation.examples import internalize_each
    from v2l_fast.video import load_spans

    model = loading.load()
    sampling = frames.override(model.config.sampling)

    def read_span(path: str, span: tuple[float, float]) -> Clip:
        return load_spans(path, sampling, span)[0]

    examples = source.examples(read_span)
    with progress_bar("analyzing") as progress:
        adapters = internalize_each(model, examples, progress, sampling=sampling)
        return analyze(model, examples, adapters, progress=progress)
