"""What commands share: option types and loading a model from options.

Imports no model code: a command's ``--help`` must come at once.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from v2l_fast.console import log, out, progress_bar, waiting
from v2l_fast.errors import ConfigError

if TYPE_CHECKING:
    from v2l_fast.model import Video2LoRA

__all__ = ["log", "out", "progress_bar"]

# -h is help everywhere; commands of a group inherit it.
CONTEXT = {"help_option_names": ["-h", "--help"]}
DTYPES = ("float32", "bfloat16", "float16")


def _known_device(name: str | None) -> str | None:
    if name is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise typer.BadParameter(f"must be cpu, cuda or cuda:N, got {name}")
    return name


def _known_dtype(name: str | None) -> str | None:
    if name is not None and name not in DTYPES:
        raise typer.BadParameter(f"must be one of {', '.join(DTYPES)}, got {name}")
    return name


def _of_64_bits(seed: int) -> int:
    if not -(2**63) <= seed < 2**63:
        raise typer.BadParameter("must be from -2^63 to 2^63 - 1")
    return seed


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
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda or cuda:N; a GPU is used when there is one.", callback=_known_device
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; by device if omitted.", callback=_known_dtype),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Force = Annotated[bool, typer.Option("--force", help="Replace outputs that exist already.")]
# What random generators of Python, NumPy and PyTorch all accept.
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of every random choice.")]
SamplingSeed = Annotated[int, typer.Option(help="Seed of sampling.", callback=_of_64_bits)]
Manifest = Annotated[Path, typer.Option("--manifest", help="Examples (JSONL).")]
Root = Annotated[
    Path | None,
    typer.Option(help="Folder that video paths are relative to; the manifest's if omitted."),
]
Split = Annotated[
    str | None, typer.Option(help="Use only this split of the manifest; all if omitted.")
]
MaxFrames = Annotated[
    int | None, typer.Option(min=1, help="Frames to sample; as in training if omitted.")
]
LongestEdge = Annotated[
    int | None,
    typer.Option(
        min=2, help="Longest frame edge in pixels, at most 4096; as in training if omitted."
    ),
]
ExactFrames = Annotated[
    bool, typer.Option("--exact-frames", help="Take exactly --max-frames, whatever the duration.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]


def output_file(path: str) -> Path:
    """An output file's path, for typer's ``parser``; a name that ends in a slash is a folder's.

    Raises:
        typer.BadParameter: the name is empty or a folder's.
    """
    if not path or path.endswith("/"):
        raise typer.BadParameter(f"must name a file, got {path!r}")
    return Path(path)


def output_path(path: str) -> str:
    """A file's or a folder's name, for typer's ``parser``.

    Raises:
        typer.BadParameter: the name is empty.
    """
    if not path.strip():
        raise typer.BadParameter(f"must name a file or a folder, got {path!r}")
    return path


def check_text(text: str) -> str:
    """Text that a tokenizer can read.

    Raises:
        ConfigError: it holds bytes that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"the question is not UTF-8 text: {text!r}; type it again") from None
    return text


def load_model(
    model: str, base: str | None = None, device: str | None = None, dtype: str | None = None
) -> Video2LoRA:
    """Load what the options name, saying so while it takes time.

    Raises:
        ConfigError: there is no such device.
        V2LError: the model cannot be loaded.
    """
    with waiting(f"loading {model}"):
        import torch

        from v2l_fast.model import Video2LoRA

        quiet_transformers()
        check_device(device)
        return Video2LoRA.from_pretrained(
            model, base=base, device=device, dtype=None if dtype is None else getattr(torch, dtype)
        )


def check_device(device: str | None) -> None:
    """Refuse a GPU that this machine does not have.

    Raises:
        ConfigError: there is no such GPU.
    """
    import torch

    if device is None or not device.startswith("cuda"):
        return
    if not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: this machine has no usable GPU; see v2l doctor")
    count = torch.cuda.device_count()
    if int(device.partition(":")[2] or 0) >= count:
        raise ConfigError(f"--device {device}: this machine has GPUs 0 to {count - 1}")


def quiet_transformers() -> None:
    """Silence transformers' notes and bars while a model loads."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
