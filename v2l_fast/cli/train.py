"""`v2l train`: reads the settings, calls the trainer, says how it ended."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from v2l_fast.cli.options import quiet_transformers
from v2l_fast.console import show_json
from v2l_fast.errors import ConfigError


def train_command(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SECTION.KEY=VALUE]...", help="Settings that replace the config's."
        ),
    ] = None,
    config: Annotated[
        str,
        typer.Option(
            "--config",
            "-c",
            help="A TOML file, or a preset: shapes, smolvlm2-500m, smolvlm2-2.2b.",
        ),
    ] = "",
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--fresh",
            help="Require a checkpoint to continue from, or start over. By default a run continues "
            "where it was stopped.",
        ),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Print the settings as JSON and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Train a hypernetwork; the frozen VLM does not change.

    \b
    v2l train --config shapes model.base=shapes
    v2l train --config shapes
    v2l train --config smolvlm2-500m 'data.manifests=["train.jsonl"]' run.folder=runs/mine
    v2l train --config my.toml optim.lr=3e-4 optim.micro_batch_size=16 --fresh

    Without model.base, the shapes preset trains its tiny base VLM first (about 20 minutes on one
    core), in the folder of the run; model.base=shapes takes the shipped one. An interruption costs
    at most the steps since the last checkpoint there, too. --fresh keeps a base that is complete.

    Several GPUs or machines (the batch stays the same, whatever their number):

    \b
    accelerate launch --num_processes 8 -m v2l_fast train --config my.toml
    torchrun --nproc-per-node 2 -m v2l_fast train --config shapes    (two CPU processes)
    torchrun --nnodes 2 --node-rank 0 --master-addr FIRST --nproc-per-node 8 -m v2l_fast train ...

    Machines share run.folder: name one on a file system that all of them mount.

    The folder of the run holds checkpoints/, hypernet/ (the latest one, loadable at any time),
    best/ (the one of the lowest validation cross-entropy, with its step in validation.json),
    log.jsonl, samples.jsonl, quarantine.jsonl (videos that could not be read) and, at the end,
    summary.json. Ctrl-C or SIGTERM finish the step, save and exit with 130 or 143; the same
    command then continues, with the numbers an uninterrupted run would have had.
    """
    from dataclasses import asdict

    try:
        from v2l_fast.training.config import load_config, preset_names
    except ModuleNotFoundError as error:
        raise ConfigError(f'training needs {error.name}: pip install "v2l_fast[train]"') from None
    if not config:
        raise typer.BadParameter(
            f"name a TOML file or a preset: --config {preset_names()[0]}", param_hint="--config"
        )
    settings = load_config(config, overrides or [])
    if show:
        show_json(asdict(settings))
        return
    if settings.data.source == "shapes":
        from v2l_fast.shapes.source import train_shapes as train
    else:
        from v2l_fast.training.trainer import train
    quiet_transformers()
    summary = train(settings, resume)
    # Set by launchers; one process prints for all.
    if as_json and os.environ.get("RANK", "0") == "0":
        show_json(summary)
