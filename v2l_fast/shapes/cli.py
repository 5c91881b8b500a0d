"""Commands of the shapes world: render clips, train the pair, evaluate it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    help="The shapes world: a tiny model pair that shows learning on any CPU.",
    no_args_is_help=True,
)

RunFolder = Annotated[Path, typer.Option(help="Folder of the run's files.")]
Seed = Annotated[int, typer.Option(help="Seed of data, initialization and order.")]
Threads = Annotated[int, typer.Option(help="CPU threads; one is best on a shared machine.")]


@app.command()
def render(
    folder: Annotated[Path, typer.Argument(help="Where the clips go.")],
    count: Annotated[int, typer.Option(help="Number of clips.")] = 8,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    size: Annotated[int, typer.Option(help="Side in pixels (even).")] = 192,
    seed: Seed = 0,
) -> None:
    """Write H.264 clips and scenes.json with their captions."""
    from v2l_fast.shapes.language import caption
    from v2l_fast.shapes.render import write_clip
    from v2l_fast.shapes.scene import SPLITS, sample_scenes
    from v2l_fast.training.trainer import write_record

    if split not in SPLITS:
        raise typer.BadParameter(f"split must be one of {', '.join(SPLITS)}, not {split}")
    if size % 2 or size < 16:
        raise typer.BadParameter(f"size must be even and at least 16, not {size}")
    folder.mkdir(parents=True, exist_ok=True)
    captions = {}
    for index, scene in enumerate(sample_scenes(split, count, seed)):
        path = write_clip(scene, folder / f"{split}_{index:04d}.mp4", size=size)
        captions[path.name] = caption(scene)
        typer.echo(f"{path}  {captions[path.name]}")
    write_record(folder / "scenes.json", captions)


@app.command("train-vlm")
def train_vlm_command(
    folder: RunFolder = Path("runs/shapes"),
    record: Annotated[Path, typer.Option(help="The run's record.")] = Path("runs/shapes-vlm.json"),
    seed: Seed = 0,
    threads: Threads = 1,
) -> None:
    """Train the tiny VLM (about 20 minutes on one core); continues where it was stopped."""
    from v2l_fast.shapes.train_vlm import train_vlm

    train_vlm(folder, record, seed=seed, threads=threads)


@app.command("train-hypernet")
def train_hypernet_command(
    folder: RunFolder = Path("runs/shapes"),
    base: Annotated[Path | None, typer.Option(help="The VLM; FOLDER/base if omitted.")] = None,
    record: Annotated[Path, typer.Option(help="The run's record.")] = Path(
        "runs/shapes-hypernet.json"
    ),
    steps: Annotated[int, typer.Option(help="Optimization steps.")] = 2000,
    videos: Annotated[int, typer.Option(help="Training videos.")] = 16384,
    batch: Annotated[int, typer.Option(help="Videos a step.")] = 48,
    seed: Seed = 0,
    threads: Threads = 1,
) -> None:
    """Train the hypernetwork (about 25 minutes on one core); continues where it was stopped."""
    from v2l_fast.shapes.train_hypernet import train_hypernet
    from v2l_fast.training.trainer import TrainSettings

    settings = TrainSettings(steps=steps, batch=batch, seed=seed)
    train_hypernet(base or folder / "base", folder, record, settings, videos, threads=threads)


@app.command()
def evaluate(
    folder: Annotated[
        Path | None, typer.Option(help="Has base/ and hypernet/; the shipped pair if omitted.")
    ] = None,
    videos: Annotated[int, typer.Option(help="Unseen videos of the test split.")] = 512,
    encoded: Annotated[int, typer.Option(help="Of them, how many also as H.264 files.")] = 64,
    record: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path(
        "runs/shapes-eval.json"
    ),
    seed: Seed = 0,
    threads: Threads = 1,
) -> None:
    """Compare direct answers, adapters and controls on the test split."""
    import torch

    from v2l_fast.model import Video2LoRA
    from v2l_fast.shapes.evaluate import evaluate as run
    from v2l_fast.shapes.evaluate import evaluate_files
    from v2l_fast.shapes.scene import sample_scenes
    from v2l_fast.training.trainer import write_record

    torch.set_num_threads(threads)
    console = Console()
    model = Video2LoRA.from_pretrained(folder or "shapes", device="cpu")
    scenes = sample_scenes("test", videos, seed)
    with console.status("loading") as status:
        result = run(model, scenes, seed, report=status.update)
        if encoded:
            status.update("H.264 files")
            result["encoded_files"] = evaluate_files(model, scenes[:encoded])
    write_record(record, result)
    table = Table(title=f"{videos} unseen videos, {result['questions']} questions, 95% intervals")
    for name in ("condition", "attributes", "caption exact", "token-F1", "QA exact"):
        table.add_column(name)
    for name, scores in result["conditions"].items():
        cells = [
            "{estimate:.3f}\n{low:.3f}-{high:.3f}".format(**scores[key])
            for key in ("caption_attributes", "caption_exact", "caption_token_f1", "qa_exact")
        ]
        table.add_row(name, *cells)
    console.print(table)
    shown = ("adapter_minus_direct", "encoded_files")
    console.print_json(data={name: result[name] for name in shown if name in result})
