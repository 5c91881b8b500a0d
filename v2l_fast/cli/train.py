"""``v2l train``: reads the settings, calls the trainer and prints its summary."""

from __future__ import annotations

import os

import typer
from typer import Argument, Option

from v2l_fast.cli.options import JSON, quiet_transformers
from v2l_fast.console import show_json


def train(
    overrides: list[str] | None = Argument(
        None, metavar="[SECTION.KEY=VALUE]...", help="Settings that override the config's."
    ),
    config: str = Option(
        "",
        "--config",
        "-c",
        help="A TOML file, or a preset: shapes, shapes-any, shapes-captions, "
        "smolvlm2-500m, smolvlm2-2.2b.",
    ),
    resume: bool | None = Option(
        None,
        "--resume/--fresh",
        help="Require a checkpoint to continue from, or start over. By default, continue if there "
        "is one.",
    ),
    show: bool = Option(False, "--show", help="Print the settings as JSON and stop."),
    as_json: bool = JSON,
) -> None:
    """Train a hypernetwork; the frozen VLM does not change.

    \b
    v2l train --config shapes model.base=shapes
    v2l train --config shapes
    v2l train --config smolvlm2-500m 'data.manifests=["train.jsonl"]' run.folder=runs/mine
    v2l train --config my.toml optim.lr=3e-4 optim.micro_batch_size=16 --fresh

    Without model.base, the shapes preset first trains its tiny base VLM (about 20 minutes on one
    core) in the folder of the run; model.base=shapes uses the shipped one. An interruption costs
    at most the steps since the last checkpoint there, too. --fresh keeps a complete base.

    On several GPUs or machines (the batch stays the same, whatever their number):

    \b
    accelerate launch --num_processes 8 -m v2l_fast train --config my.toml
    torchrun --nproc-per-node 2 -m v2l_fast train --config shapes    (two CPU processes)
    torchrun --nnodes 2 --node-rank 0 --master-addr FIRST --nproc-per-node 8 -m v2l_fast train ...

    Machines share run.folder, which must be on a file system that all of them mount.

    The folder of the run holds checkpoints/, hypernet/ (the latest one, loadable at any time),
    best/ (the one with the lowest validation cross-entropy; validation.json has its step),
    log.jsonl, samples.jsonl, quarantine.jsonl (videos that could not be read) and, at the end,
    summary.json. Ctrl-C or SIGTERM finishes the step, saves and exits with 130 or 143. The same
    command then continues, with the numbers of an uninterrupted run.
    """
    from dataclasses import asdict

    from v2l_fast.training.config import load_config, preset_names

    if not config:
        raise typer.BadParameter(
            f"name a TOML file or a preset: --config {preset_names()[0]}", param_hint="--config"
        )
    settings = load_config(config, overrides or [])
    if show:
        show_json(asdict(settings))
        return
    if settings.data.source != "manifest":
        from v2l_fast.shapes.source import train_shapes as run
    else:
        from v2l_fast.training.trainer import train as run
    quiet_transformers()
    summary = run(settings, resume)
    # Launchers set RANK; one process prints for all.
    if as_json and os.environ.get("RANK", "0") == "0":
        show_json(summary)
