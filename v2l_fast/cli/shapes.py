"""Commands of the shapes world: render clips, train the pair, evaluate it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from v2l_fast.cli.options import Force, Seed
from v2l_fast.console import progress_bar, say, show, show_json, show_table

app = typer.Typer(
    help="The shapes world: a tiny model pair that shows learning on any CPU.",
    no_args_is_help=True,
)

RunFolder = Annotated[Path, typer.Option(help="Folder of the run's files.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads; one is best on a shared machine.")]


@app.command()
def render(
    folder: Annotated[Path, typer.Argument(help="Where the clips go.")],
    count: Annotated[int, typer.Option(min=1, help="Number of clips.")] = 8,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    size: Annotated[
        int, typer.Option(min=16, max=4096, help="Side of a frame in pixels, an even number.")
    ] = 192,
    seed: Seed = 0,
    force: Force = False,
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
    from v2l_fast.shapes.world import SPLITS, sample_scenes

    if split not in SPLITS:
        raise typer.BadParameter(f"--split must be one of {', '.join(SPLITS)}, got {split}")
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


@app.command("train-vlm")
def train_vlm_command(
    folder: RunFolder = Path("runs/shapes"),
    record: Annotated[Path, typer.Option(help="File for the run's record (JSON).")] = Path(
        "runs/shapes-vlm.json"
    ),
    seed: Seed = 0,
    threads: Threads = 1,
    force: Force = False,
) -> None:
    """Train the tiny VLM (about 20 minutes on one core).

    Repeat the same command to continue after an interruption.
    """
    from v2l_fast.outputs import check_folder, check_output
    from v2l_fast.shapes.train import train_vlm

    check_folder(folder)
    check_output(record, force=force)
    train_vlm(folder, record, seed=seed, threads=threads)


@app.command()
def evaluate(
    folder: Annotated[
        Path | None, typer.Option(help="Has base/ and hypernet/; the shipped pair if omitted.")
    ] = None,
    videos: Annotated[int, typer.Option(min=1, help="Unseen videos of the test split.")] = 512,
    encoded: Annotated[
        int, typer.Option(min=0, help="Number of them that are also read as H.264 files.")
    ] = 64,
    probes: Annotated[
        bool,
        typer.Option(
            help="Also other durations, binding, untrained kinds of questions, absent objects."
        ),
    ] = True,
    record: Annotated[Path, typer.Option(help="File for the results (JSON).")] = Path(
        "runs/shapes-eval.json"
    ),
    seed: Seed = 0,
    threads: Threads = 1,
    force: Force = False,
) -> None:
    """Compare direct answers, adapters and controls on the test split, and probe what averages
    hide."""
    import torch

    from v2l_fast.files import write_json
    from v2l_fast.model import Video2LoRA
    from v2l_fast.outputs import check_output
    from v2l_fast.shapes.evaluate import evaluate as run
    from v2l_fast.shapes.evaluate import evaluate_files
    from v2l_fast.shapes.probes import probe
    from v2l_fast.shapes.report_page import probe_tables
    from v2l_fast.shapes.world import sample_scenes

    check_output(record, force=force)
    torch.set_num_threads(threads)
    model = Video2LoRA.from_pretrained(folder or "shapes", device="cpu")
    scenes = sample_scenes("test", videos, seed)
    with progress_bar("evaluating") as progress:
        result = run(model, scenes, seed, progress)
        if encoded:
            progress("H.264 files", 0, 1)
            result["encoded_files"] = evaluate_files(model, scenes[:encoded])
        if probes:
            result["probes"] = probe(model, scenes, seed, progress)
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
    if probes:
        for part in probe_tables(result["probes"]):
            show(part)


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="Folder of the page and its plots.")] = Path(
        "docs/shapes"
    ),
    records: Annotated[
        Path, typer.Option(help="Folder of the records; pieces in it are not measured again.")
    ] = Path("runs/shapes-report"),
    only: Annotated[
        list[str] | None,
        typer.Option(help="Measure this piece alone, repeatable; the page has all records."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Has base/ and hypernet/; the shipped pair if omitted.")
    ] = None,
    trained: Annotated[
        str | None,
        typer.Option(
            help="Hypernetwork trained on chunks, to compare with; the shipped one for the shipped "
            "pair if omitted."
        ),
    ] = None,
    videos: Annotated[
        int, typer.Option(min=1, help="Unseen videos; expensive pieces take fewer.")
    ] = 512,
    seed: Seed = 0,
    threads: Threads = 1,
    force: Force = False,
) -> None:
    """Measure everything on the shapes world and write one page about it.

    \b
    v2l shapes report
    v2l shapes report --only rank --only layers --videos 64 --records runs/small --out runs/page
    """
    import torch

    from v2l_fast.model import Video2LoRA
    from v2l_fast.outputs import check_folder
    from v2l_fast.shapes.report import PIECES, ShapesReport, measure
    from v2l_fast.shapes.report_page import FILES, write_page

    check_folder(records)
    check_folder(out, FILES, force=force)
    torch.set_num_threads(threads)
    base = None if folder is None else folder / "base"
    pair = Video2LoRA.from_pretrained(folder or "shapes", base, device="cpu")
    trained = trained or ("shapes-chunks" if folder is None else None)
    chunked = trained and Video2LoRA.from_pretrained(trained, base, device="cpu")
    with progress_bar("report") as progress:
        made = ShapesReport(pair, records, videos, chunked, seed, progress)
        measure(made, only or tuple(PIECES))
    say(str(write_page(made.made(), out)))
