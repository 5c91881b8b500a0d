"""Options that commands share, as dataclasses, and the decorator that expands them for typer.

Imports no model code, because a command's ``--help`` must come at once.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import typer
from typer import Option
from typer.models import ParameterInfo

from v2l_fast.console import waiting
from v2l_fast.errors import ConfigError

if TYPE_CHECKING:
    from v2l_fast.model import Video2LoRA
    from v2l_fast.video import FrameSampling

# -h is help everywhere; commands of a group inherit it.
CONTEXT = {"help_option_names": ["-h", "--help"]}


def options(panel: str) -> Callable[[type], type]:
    """Make a frozen dataclass of fields whose defaults are ``Option(...)``.

    Args:
        panel: heading of these options in ``--help``.
    """

    def decorate(kind: type) -> type:
        for name, option in list(vars(kind).items()):
            if isinstance(option, ParameterInfo):
                option = copy.copy(option)
                option.rich_help_panel = panel
                default = dataclasses.MISSING if option.default is ... else option.default
                setattr(kind, name, dataclasses.field(default=default, metadata={"": option}))
        return dataclasses.dataclass(frozen=True, kw_only=True)(kind)

    return decorate


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give typer one option for each field of a command's parameters that are ``@options``."""
    hints = get_type_hints(command)
    groups: dict[str, Any] = {
        n: kind for n, kind in hints.items() if dataclasses.is_dataclass(kind)
    }
    signature = inspect.signature(command)
    parameters = []
    for name, parameter in signature.parameters.items():
        if name in groups:
            types = get_type_hints(groups[name])
            fields = dataclasses.fields(groups[name])
            parameters += [(f.name, f.metadata[""], types[f.name]) for f in fields]
        else:
            parameters.append((name, parameter.default, hints[name]))

    @functools.wraps(command)
    def expanded(**values: Any) -> None:
        for name, kind in groups.items():
            fields = [field.name for field in dataclasses.fields(kind) if field.name in values]
            values[name] = kind(**{field: values.pop(field) for field in fields})
        for name, parameter in signature.parameters.items():
            if name not in values:
                values[name] = parameter.default.default
        command(**values)

    vars(expanded)["__signature__"] = inspect.Signature(
        [
            inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for n, default, kind in parameters
        ]
    )
    expanded.__annotations__ = {}
    return expanded


# --- options --------------------------------------------------------------------------------------


def one_of(*names: str) -> Callable[[str | None], str | None]:
    """A typer callback that accepts these names only."""

    def check(name: str | None) -> str | None:
        if name is not None and name not in names:
            raise typer.BadParameter(f"must be one of {', '.join(names)}, got {name}")
        return name

    return check


def _check_device(name: str | None) -> str | None:
    if name is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise typer.BadParameter(f"must be cpu, cuda or cuda:N, got {name}")
    return name


def _check_64_bits(seed: int) -> int:
    if not -(2**63) <= seed < 2**63:
        raise typer.BadParameter("must be from -2^63 to 2^63 - 1")
    return seed


DEVICE = Option(
    None, help="cpu, cuda or cuda:N. By default, a GPU if there is one.", callback=_check_device
)
JSON = Option(False, "--json", help="Print JSON for programs.")
FORCE = Option(False, "--force", help="Replace existing outputs.")
# The range that the random generators of Python, NumPy and PyTorch have in common.
SEED = Option(0, min=0, max=2**32 - 1, help="Seed of all random choices.")
MAX_NEW_TOKENS = Option(128, min=1, help="Maximum tokens of an answer.")
EXACT_FRAMES = Option(
    False, "--exact-frames", help="Take exactly --max-frames, whatever the duration."
)


@options("Model")
class ModelOptions:
    """A hypernetwork with its frozen VLM."""

    model: str = Option(
        "shapes-any",
        "--model",
        "-m",
        envvar="V2L_MODEL",
        help="Hypernetwork: 'shapes-any' (shipped), a folder, a hub id or a released .pt file.",
    )
    base: str | None = Option(None, help="Frozen VLM. By default, the one in the model's config.")
    device: str | None = DEVICE
    dtype: str | None = Option(
        None,
        help="float32, bfloat16 or float16. By default, it depends on the device.",
        callback=one_of("float32", "bfloat16", "float16"),
    )

    def load(self, compile: bool | None = None) -> Video2LoRA:
        """Load the model, and report it if it takes long.

        Args:
            compile: as for ``Video2LoRA.from_pretrained``; False for a few passes, which would not
                make up for minutes of compiling.

        Raises:
            ConfigError: the device does not exist.
            V2LError: the model cannot be loaded.
        """
        with waiting(f"loading {self.model}"):
            import torch

            from v2l_fast.model import Video2LoRA

            quiet_transformers()
            check_device(self.device)
            dtype = None if self.dtype is None else getattr(torch, self.dtype)
            return Video2LoRA.from_pretrained(
                self.model, base=self.base, device=self.device, dtype=dtype, compile=compile
            )


@options("Frames")
class FrameOptions:
    """The frames to sample from a video."""

    max_frames: int | None = Option(
        None, min=1, help="Maximum number of frames. By default, as in training."
    )
    longest_edge: int | None = Option(
        None, min=2, help="Longest frame edge in pixels, at most 4096. By default, as in training."
    )
    exact_frames: bool = EXACT_FRAMES

    def override(self, training: FrameSampling) -> FrameSampling:
        """The sampling of training with what these options change.

        Raises:
            ConfigError: a value is out of range.
        """
        return training.override(self.max_frames, self.longest_edge, exact_frames=self.exact_frames)


@options("Answers")
class GenerationOptions:
    """How answers are generated."""

    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = Option(0.0, help="Sampling temperature; 0 is greedy.")
    top_p: float = Option(1.0, help="Probability mass to sample from (nucleus sampling).")
    seed: int = Option(0, help="Seed of sampling.", callback=_check_64_bits)


@options("Manifest")
class ManifestOptions:
    """A manifest of examples about videos."""

    manifest: Path = Option(..., "--manifest", help="Examples (JSON lines).")
    root: Path | None = Option(
        None, help="Folder that video paths are relative to. By default, the manifest's."
    )


@options("Manifest")
class ExampleOptions(ManifestOptions):
    """Examples of a manifest."""

    split: str | None = Option(None, help="Use only this split of the manifest.")


# --- arguments ------------------------------------------------------------------------------------


def output_file(path: str) -> Path:
    """Parse an output file's path; a name that ends in a slash is a folder's.

    Raises:
        typer.BadParameter: the name is empty or a folder's.
    """
    if not path or path.endswith("/"):
        raise typer.BadParameter(f"must name a file, got {path!r}")
    return Path(path)


def output_path(path: str) -> str:
    """Parse the name of an output file or folder.

    Raises:
        typer.BadParameter: the name is empty.
    """
    if not path.strip():
        raise typer.BadParameter(f"must name a file or a folder, got {path!r}")
    return path


def check_text(text: str) -> str:
    """Return a text if a tokenizer can read it.

    Raises:
        ConfigError: it holds bytes that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"the question is not UTF-8 text: {text!r}; type it again") from None
    return text


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
    """Silence the messages and progress bars of transformers."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
