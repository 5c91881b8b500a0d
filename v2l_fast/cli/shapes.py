"""``v2l shapes ...``: render clips of the shapes world, train its VLM, evaluate its pair."""

from __future__ import annotations

from pathlib import Path

import typer
from typer import Argument, Option

from v2l_fast.cli.options import CONTEXT, FORCE, SEED, one_of, options, with_options
from v2l_fast.console import progress_bar, say, show, show_json, show_table

app = typer.Typer(
    help="The shapes world: a tiny model pair that shows learning on any CPU.",
    no_args_is_help=True,
    context_settings=CONTEXT,
)

PAIR = Option(None, help="Folder with base/ and hypernet/. By default, the pair 'shapes'.")


@options("Run")
class RunOptions:
    """How an experiment runs."""

    seed: int = SEED
    threads: int = Option(1, min=1, help="CPU threads; one is best on a shared machine.")
    force: bool = FORCE


@app.command()
def render(
    folder: Path = Argument(..., help="Folder of the clips."),
    count: int = Option(8, min=1, help="Number of clips."),
    split: str = Option(
        "test", help="train, val or test.", callback=one_of("train", "val", "test")
    ),
    size: int = Option(192, min=16, max=4096, help="Side of a frame in pixels, an even number."),
    seed: int = SEED,
    force: bool = FORCE,
) -> None:
    """Write H.264 clips and manifest.jsonl: a caption and five questions about each.

    \b
    v2l shapes render clips --count 64 && v2l evaluate --manifest clips/manifest.jsonl
    """
    from v2l_fast.data.manifest import write_manifest
    from v2l_fast.outputs import check_folder
    from v2l_fast.shapes.evaluate import clip_name, examples_for
    from v2l_fast.shapes.language import caption
    from v2l_fast.shapes.render import write_clip
    from v2l_fast.shapes.world import sample_scenes

    if size % 2:
        raise typer.BadParameter(f"--size must be even, got {size}")
    names = [clip_name(split, index) for index in range(count)]
    check_folder(folder, [*names, "manifest.jsonl"], force=force)
    folder.mkdir(parents=True, exist_ok=True)
    scenes = sample_scenes(split, count, seed)
    for name, scene in zip(names, scenes, strict=True):
        path = write_clip(scene, folder / name, size=size)
        say(f"{path}  {caption(scene)}")
    rows = (example.row() for example in examples_for(scenes, split, seed))
    write_manifest(folder / "manifest.jsonl", rows)


@app.command()
@with_options
def train_vlm(
    running: RunOptions,
    folder: Path = Option(Path("runs/shapes"), help="Folder of the run's files."),
    record: Path = Option(Path("runs/shapes-vlm.json"), help="File of the run's record (JSON)."),
) -> None:
    """Train the tiny VLM (about 20 minutes on one core).

    Repeat the same command to continue after an interruption.

    \b
    v2l shapes train-vlm --folder runs/shapes
    """
    from v2l_fast.outputs import check_folder, check_output
    from v2l_fast.shapes.train import train_vlm as run

    check_folder(folder)
    check_output(record, force=running.force)
    run(folder, record, seed=running.seed, threads=running.threads)


@app.command()
@with_options
def widen_vlm(
    running: RunOptions,
    start: Path = Argument(..., help="Folder of the tiny VLM of train-vlm."),
    folder: Path = Option(Path("runs/shapes-widened"), help="Folder of the run's files."),
    record: Path = Option(
        Path("runs/shapes-widening.json"), help="File of the run's record (JSON)."
    ),
) -> None:
    """Train the tiny VLM further: clips of 2 to 64 s, objects by name, absent objects (about 40
    minutes on one core).

    Repeat the same command to continue after an interruption.

    \b
    v2l shapes widen-vlm runs/shapes/base --folder runs/shapes-widened
    """
    from v2l_fast.outputs import check_folder, check_output
    from v2l_fast.shapes.widen import widen_base

    check_folder(folder)
    check_output(record, force=running.force)
    widen_base(start, folder, record, seed=running.seed, threads=running.threads)


@app.command()
@with_options
def vary_vlm(
    running: RunOptions,
    start: Path = Argument(..., help="Folder of the tiny VLM of widen-vlm."),
    folder: Path = Option(Path("runs/shapes-varied"), help="Folder of the run's files."),
    record: Path = Option(
        Path("runs/shapes-varying.json"), help="File of the run's record (JSON)."
    ),
) -> None:
    """Train the tiny VLM further: up to three objects, other styles, textured backgrounds, posts in
    front, detailed descriptions (about an hour on one core; needs scikit-image, whose photographs
    are among the backgrounds: pip install 'v2l_fast[shapes]').

    Repeat the same command to continue after an interruption.

    \b
    v2l shapes vary-vlm runs/shapes-widened/base --folder runs/shapes-varied
    """
    from v2l_fast.outputs import check_folder, check_output
    from v2l_fast.shapes.widen import vary_base

    check_folder(folder)
    check_output(record, force=running.force)
    vary_base(start, folder, record, seed=running.seed, threads=running.threads)


@app.command()
@with_options
def evaluate(
    running: RunOptions,
    folder: Path | None = PAIR,
    videos: int = Option(512, min=1, help="Unseen videos of the test split."),
    encoded: int = Option(64, min=0, help="Number of them that are also read as H.264 files."),
    turns: int = Option(
        64, min=0, help="Number of them that are also asked two questions in one conversation."
    ),
    probes: bool = Option(
        True,
        help="Also test other durations, binding, further questions, absent objects and other "
        "looks (pip install 'v2l_fast[shapes]').",
    ),
    captions_only: str | None = Option(
        None,
        help="Hypernetwork trained on captions only, for the same base, evaluated alongside.",
    ),
    record: Path = Option(Path("runs/shapes-eval.json"), help="File of the results (JSON)."),
) -> None:
    """Compare direct answers, adapters and controls on the test split, and probe what averages
    hide.

    \b
    v2l shapes evaluate --videos 64 --record runs/mine.json
    """
    import torch

    from v2l_fast.files import write_json
    from v2l_fast.model import Video2LoRA
    from v2l_fast.outputs import check_output
    from v2l_fast.shapes.evaluate import evaluate as run
    from v2l_fast.shapes.evaluate import evaluate_files, evaluate_turns
    from v2l_fast.shapes.looks import HELD_OUT_PHOTOS, photograph
    from v2l_fast.shapes.probes import probe
    from v2l_fast.shapes.report_page import probe_tables
    from v2l_fast.shapes.world import sample_scenes

    check_output(record, force=running.force)
    if probes:
        photograph(HELD_OUT_PHOTOS[0])  # Missing photographs are an error now, not in an hour.
    torch.set_num_threads(running.threads)
    model = Video2LoRA.from_pretrained(folder or "shapes", device="cpu")
    scenes = sample_scenes("test", videos, running.seed)
    with progress_bar("evaluating") as progress:
        result = run(model, scenes, running.seed, progress)
        if encoded:
            progress("H.264 files", 0, 1)
            result["encoded_files"] = evaluate_files(model, scenes[:encoded])
        if turns:
            progress("conversations", 0, 1)
            result["turns"] = evaluate_turns(model, scenes[:turns], running.seed)
        if probes:
            second = captions_only and Video2LoRA.from_pretrained(
                captions_only, folder and folder / "base", device="cpu"
            )
            result["probes"] = probe(model, scenes, running.seed, progress, second or None)
    write_json(record, result)
    rows = []
    for name in result["conditions"]:
        shares = (result[key][name] for key in ("attributes", "caption_exact"))
        rows.append((name, *("{estimate:.3f} [{low:.3f}, {high:.3f}]".format(**x) for x in shares)))
    show_table(
        ("condition", "correct attributes", "exact captions"), rows,
        f"{videos} unseen videos, 95% intervals",
    )  # fmt: skip
    show(result["table"])
    if encoded:
        show_json(result["encoded_files"])
    if turns:
        show_json(result["turns"])
    if probes:
        for part in probe_tables(result["probes"]):
            show(part)


@app.command()
@with_options
def report(
    running: RunOptions,
    out: Path = Option(Path("docs/shapes"), help="Folder of the page and its plots."),
    records: Path = Option(
        Path("runs/shapes-report"),
        help="Folder of the records; pieces in it are not measured again.",
    ),
    only: list[str] | None = Option(
        None, help="Measure only this piece, repeatable; the page shows all records."
    ),
    folder: Path | None = PAIR,
    trained: str | None = Option(
        None,
        help="Hypernetwork trained on chunks, for comparison. By default, the shipped one for "
        "the shipped pair.",
    ),
    videos: int = Option(512, min=1, help="Unseen videos; expensive pieces take fewer."),
) -> None:
    """Measure everything on the shapes world and write one page about it.

    \b
    v2l shapes report
    v2l shapes report --only rank --only layers --videos 64 --records runs/small --out runs/page
    """
    import torch

    from v2l_fast.model import Video2LoRA
    from v2l_fast.outputs import check_folder
    from v2l_fast.shapes.report import MEASUREMENTS, ShapesReport, measure
    from v2l_fast.shapes.report_page import FILES, write_page

    check_folder(records)
    check_folder(out, FILES, force=running.force)
    torch.set_num_threads(running.threads)
    base = None if folder is None else folder / "base"
    pair = Video2LoRA.from_pretrained(folder or "shapes", base, device="cpu")
    trained = trained or ("shapes-chunks" if folder is None else None)
    chunked = trained and Video2LoRA.from_pretrained(trained, base, device="cpu")
    with progress_bar("report") as progress:
        measured = ShapesReport(pair, records, videos, chunked, running.seed, progress)
        measure(measured, only or tuple(MEASUREMENTS))
    say(str(write_page(measured.records(), out)))
