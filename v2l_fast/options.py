"""What commands share: option types, consoles, progress bars, and loading a model from options.

Imports no model code: a command's ``--help`` must come at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from v2l_fast.errors import ConfigError

if TYPE_CHECKING:
    from v2l_fast.model import Video2LoRA

out = Console()
log = Console(stderr=True)

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        envvar="V2L_MODEL",
        help="Hypernetwork: 'shapes' (shipped), a folder, a hub id or a released .pt file.",
    ),
]
Base = Annotated[
    str | None, typer.Option(help="Frozen VLM; from the hypernetwork's config if omitted.")
]
Device = Annotated[str | None, typer.Option(help="cuda or cpu; a GPU is used when there is one.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; by device if omitted.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Manifest = Annotated[Path, typer.Option("--manifest", help="Examples (JSONL).")]
Root = Annotated[
    Path | None, typer.Option(help="What video paths start from; the manifest's folder if omitted.")
]
Split = Annotated[str | None, typer.Option(help="Of the manifest; all if omitted.")]
MaxFrames = Annotated[int | None, typer.Option(help="Frames to sample; as in training if omitted.")]
LongestEdge = Annotated[
    int | None, typer.Option(help="Longest frame edge in pixels; as in training if omitted.")
]
ExactFrames = Annotated[
    bool, typer.Option("--exact-frames", help="Take exactly --max-frames, whatever the duration.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]


def load_model(
    model: str, base: str | None = None, device: str | None = None, dtype: str | None = None
) -> Video2LoRA:
    """Load what the options name, saying so while it takes time.

    Raises:
        ConfigError: there is no such device.
        V2LError: the model cannot be loaded.
    """
    with log.status(f"loading {model}"):
        import torch

        from v2l_fast.model import Video2LoRA

        quiet_transformers()
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if dtype is not None and dtype not in dtypes:
            raise typer.BadParameter(f"--dtype is one of {', '.join(dtypes)}, not {dtype}")
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"--device {device}: this machine has no usable GPU; see v2l doctor")
        return Video2LoRA.from_pretrained(
            model, base=base, device=device, dtype=None if dtype is None else dtypes[dtype]
        )


def quiet_transformers() -> None:
    """No notes and bars of transformers' own while a model loads."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error, to call with (stage, done, total)."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=log, transient=True) as bar:
        task = bar.add_task(name, total=None)

        def report(stage: str, done: int, total: int) -> None:
            bar.update(task, description=f"{name}: {stage}", completed=done, total=total)

        yield report
