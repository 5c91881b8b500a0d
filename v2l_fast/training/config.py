"""Settings of a training run: frozen pydantic dataclasses, TOML presets, `key=value` overrides.

Every field declares its type and its range where it stands. An error names the field, where its
value comes from, the value and the remedy, in one line, before anything is loaded.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_type_hints

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails, PydanticCustomError

from v2l_fast.errors import ConfigError, excerpt
from v2l_fast.files import read_text
from v2l_fast.hypernet.config import INSTRUCTION, HypernetConfig
from v2l_fast.video.preprocess import MAX_EDGE, FrameSampling
from v2l_fast.video.reader import Backend

PRESETS = Path(__file__).parent / "presets"
# Fields of the hypernetwork that come from the base and from `data`.
FROM_BASE = ("hidden_size", "num_layers", "base_model_name_or_path")
FROM_DATA = ("max_frames", "longest_edge", "target_fps", "instruction")

# Numbers are not converted from text, nor text from numbers.
STRICT = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")

T = TypeVar("T")
Count = Annotated[int, Field(ge=1)]
# 0 means none, never, no limit or automatic.
CountOrZero = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotBlank = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
# A list; one value stands for a list of one.
Many = Annotated[
    tuple[T, ...],
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list | tuple) else (value,)),
]


def _hypernet_fields(values: Mapping[str, Any]) -> Mapping[str, Any]:
    free = [f.name for f in fields(HypernetConfig) if f.name not in (*FROM_BASE, *FROM_DATA)]
    for name in values:
        if name in FROM_BASE:
            message = "is set by the base; leave it out"
        elif name in FROM_DATA:
            message = f"is set by data.{name}; set it there"
        elif name not in free:
            message = f"is unknown{did_you_mean(name, free)}"
        else:
            continue
        raise PydanticCustomError("hypernet", "{message}", {"name": name, "message": message})
    return values


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """The frozen model and the hypernetwork.

    Attributes:
        base: folder or hub id of the frozen VLM; "" where the data source provides its own.
        hypernet: fields of `HypernetConfig` that differ from its defaults; `target_modules` is a
            list of names. Sizes come from the base, sampling and instruction from `data`.
        init: hypernetwork to start from (folder, hub id or released .pt); "" for a fresh one.
        dtype: of the frozen model and of all computation; "auto" is bfloat16 on a GPU and float32
            on a CPU. The hypernetwork's own parameters are always float32.
        recompute: recompute each layer's activations in the backward pass, so that memory hardly
            grows with the number of layers; None does so where keeping them would take more than
            half of the available memory. The result is the same.
    """

    base: str = ""
    hypernet: Annotated[Mapping[str, Any], AfterValidator(_hypernet_fields)] = field(
        default_factory=dict
    )
    init: str = ""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    recompute: bool | None = None


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Videos and how they are read.

    Attributes:
        source: "manifest" (JSONL files), or rendered videos of the toy world: "shapes" (8 s),
            "shapes-varied" (2 to 64 s, up to three objects, any look) or "shapes-captions" (as the
            last; the targets are captions and descriptions that the frozen model writes).
        manifests, val_manifests: JSONL files; without the second, `val_share` of the videos of
            the first are kept from training.
        videos: limit on the number of training videos (0: no limit).
        val_videos: number of videos of a validation pass (0: no validation).
        prompts_per_video: questions that share a video's encoding in one step.
        caption_share: mean share of captions among them, where a video has captions and questions.
        max_frames, longest_edge, target_fps: sampling and resolution (pixels); None takes those of
            `model.init`, else those that hypernetworks for the base are trained with.
        exact_frames: take exactly `max_frames` frames, whatever the duration.
        instruction: text that follows the video in the context pass.
        chunks: numbers of chunks a video is cut into; each step draws one of them for each video.
        feature_cache: connector outputs on disk. "auto" stores those of all videos in the run's
            folder before the first step, if each is read more than once and they take at most half
            of the free space; a folder that `v2l cache` filled is read only; "off" (or "") always
            reads the videos. Features are those of videos encoded alone, not in batches, so
            results differ by rounding from those without; whether they were stored before the run
            changes no bit. (Rendered sources keep theirs in the named or the run's folder.)
        answer_length_tags: half of the questions state how long their answer is.
        second_turn_share: share of the questions that follow another question of the same video and
            its answer, as the second turn of a conversation.
        question_weights: how often a question about an object by its name asks about an attribute,
            relative to the others ("shapes-varied" only; default 1, "motion" 2).
        decoder: "pyav", "torchcodec" or "dali"; "auto" is DALI for what it can decode on a GPU,
            and PyAV for the rest.
        workers: processes that read videos ahead of the step, threads where a GPU decodes; 0 reads
            in the step.
        prefetch: batches each worker reads ahead.
    """

    source: Literal["manifest", "shapes", "shapes-varied", "shapes-captions"] = "manifest"
    manifests: Many[str] = ()
    val_manifests: Many[str] = ()
    val_share: Annotated[float, Field(ge=0, le=0.5)] = 0.01
    videos: CountOrZero = 0
    val_videos: CountOrZero = 64
    prompts_per_video: Count = 4
    caption_share: Share = 0.5
    max_frames: Count | None = None
    longest_edge: Annotated[int, Field(ge=2, le=MAX_EDGE)] | None = None
    target_fps: Positive | None = None
    exact_frames: bool = False
    instruction: str = INSTRUCTION
    chunks: Annotated[Many[Count], Field(min_length=1)] = (1,)
    feature_cache: str = "auto"
    answer_length_tags: bool = False
    second_turn_share: Share = 0.0
    question_weights: Mapping[Literal["size", "color", "shape", "motion"], Positive] = field(
        default_factory=dict
    )
    decoder: Backend = "auto"
    workers: CountOrZero = 4
    prefetch: Count = 2

    @property
    def sampling(self) -> FrameSampling:
        """Frames and resolution, once :meth:`TrainConfig.with_sampling` has filled them in.

        Raises:
            ConfigError: a value is still None.
        """
        # Types cannot tell a filled configuration from another one; FrameSampling refuses None.
        values = cast(tuple[int, int, float], (self.max_frames, self.longest_edge, self.target_fps))
        return FrameSampling(*values, self.exact_frames)


@dataclass(frozen=True, config=STRICT)
class OptimConfig:
    """AdamW and its schedule.

    Attributes:
        steps: optimizer steps.
        batch_size: videos of one step over all processes and accumulated micro-batches.
        micro_batch_size: maximum videos per forward pass and process.
        lr, betas, eps, weight_decay: of AdamW.
        scaler_lr_factor, scaler_weight_decay: the scalers' learning rate (times `lr`) and decay.
        schedule: "cosine" to `final_lr_ratio`, or "trapezoid" (flat, then linear to it).
        warmup_ratio: share of the steps in which the rate rises; `warmup_steps` replaces it.
        decay_ratio: share of the steps in which a trapezoid falls.
        clip: largest norm of the gradient (0: no limit).
    """

    steps: Count = 1000
    batch_size: Count = 8
    micro_batch_size: Count = 8
    lr: NonNegative = 1e-4
    betas: Annotated[Many[Share], Field(min_length=2, max_length=2)] = (0.9, 0.999)
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.01
    scaler_lr_factor: NonNegative = 1.0
    scaler_weight_decay: NonNegative = 0.01
    schedule: Literal["cosine", "trapezoid"] = "cosine"
    warmup_ratio: Share = 0.03
    warmup_steps: CountOrZero = 0
    decay_ratio: Share = 0.4
    final_lr_ratio: Share = 0.0
    clip: NonNegative = 1.0

    def accumulation(self, processes: int) -> int:
        """Micro-batches each process accumulates in one step.

        Shares and micro-batches that do not divide the batch differ by one video.

        Raises:
            ConfigError: more processes than videos in a batch.
        """
        if processes > self.batch_size:
            raise ConfigError(
                f"optim.batch_size={self.batch_size} cannot be shared by {processes} processes; "
                f"start at most {self.batch_size}"
            )
        share = -(-self.batch_size // processes)
        return -(-share // self.micro_batch_size)


@dataclass(frozen=True, config=STRICT)
class LossConfig:
    """What is minimized: cross-entropy, averaged over each answer and then over answers.

    Attributes:
        kind_weights: weight of each task type within its video: the answers of a type share its
            weight equally, and the weights of a video's answers add up to their number. Empty:
            every answer weighs 1.
        kl_weight, kl_temperature: KL divergence to the frozen model with the video in context;
            weight 0 turns it off.
    """

    kind_weights: Mapping[str, NonNegative] = field(default_factory=dict)
    kl_weight: NonNegative = 0.0
    kl_temperature: Positive = 1.0


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """The run around the training; of these, only the seed changes what is learned.

    Attributes:
        folder: of checkpoints, logs, `hypernet/` (the latest loadable network), `best/` (the one
            of the lowest validation cross-entropy) and `summary.json`; every machine of a run must
            see it.
        seed: of initialization, order and every choice the data source makes.
        device: "auto", "cuda" or "cpu".
        threads: of the CPU's operators (0: PyTorch's default).
        compile: "auto" (on a GPU), "on" or "off".
        log_every, checkpoint_every, val_every, sample_every: in steps; 0 is never (checkpoints and
            validation also come at the end).
        samples: answers generated every `sample_every` steps.
        keep: checkpoints kept.
        export_dtype: of `hypernet/`.
        trackers: "tensorboard", "wandb", both or none.
        name: the run's name in trackers; that of the folder if empty.
    """

    folder: NotBlank = "runs/train"
    # The generator of every step is seeded with a multiple of it.
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    device: Literal["auto", "cuda", "cpu"] = "auto"
    threads: CountOrZero = 0
    compile: Literal["auto", "on", "off"] = "auto"
    log_every: Count = 10
    checkpoint_every: CountOrZero = 250
    val_every: CountOrZero = 250
    sample_every: CountOrZero = 500
    samples: Count = 4
    keep: Count = 2
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    trackers: Many[Literal["tensorboard", "wandb"]] = ("tensorboard",)
    name: str = ""


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """All settings of a run.

    Raises:
        pydantic.ValidationError: a value is out of range, or two cannot work together.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def feature_folder(self) -> Path:
        """The folder of stored features: that of `data.feature_cache`, or one in the run's."""
        named = self.data.feature_cache
        return Path(self.run.folder) / "features" if named in ("", "auto", "off") else Path(named)

    @model_validator(mode="after")
    def _check_question_weights(self) -> TrainConfig:
        if self.data.question_weights and self.data.source != "shapes-varied":
            raise ValueError(
                "data.question_weights is for data.source=shapes-varied, not for "
                f"{self.data.source}; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_teacher(self) -> TrainConfig:
        if self.loss.kl_weight and (self.data.source != "manifest" or max(self.data.chunks) > 1):
            raise ValueError(
                f"loss.kl_weight={self.loss.kl_weight} needs a teacher that sees each video in one "
                "piece: data.source=manifest and data.chunks=[1]; or set it to 0"
            )
        return self

    def with_sampling(self, default: FrameSampling) -> TrainConfig:
        """These settings with `default` in place of the frames and resolution left open."""
        data = self.data
        sampling = default.override(data.max_frames, data.longest_edge, data.target_fps)
        filled = replace(
            data,
            max_frames=sampling.max_frames,
            longest_edge=sampling.longest_edge,
            target_fps=sampling.target_fps,
        )
        return replace(self, data=filled)

    def fingerprint(self) -> dict[str, Any]:
        """The settings that determine the result, by dotted name; a checkpoint continues only
        under equal ones."""
        free = {
            "optim.micro_batch_size", "data.workers", "data.prefetch", "data.feature_cache",
            "data.val_manifests", "data.val_videos", "model.init", "model.recompute",
        }  # fmt: skip
        flat = flatten(asdict(self)).items()
        kept = {k: v for k, v in flat if k not in free and not k.startswith("run.")}
        return {**kept, "run.seed": self.run.seed}


# --- from files and command lines -----------------------------------------------------------------


class ConfigSources:
    """Values by dotted key, and the words that say where each comes from."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}

    def add(self, values: Mapping[str, Any], origin: str) -> None:
        """Add nested `values`, which replace earlier ones. origin: such as "in my.toml"."""
        for key, value in flatten(values).items():
            self.values[key] = value
            self.origins[key] = origin

    def origin(self, key: str) -> str:
        """Where the value of `key` comes from, "" for a default."""
        for known, origin in reversed(self.origins.items()):
            if f"{known}.".startswith(f"{key}.") or key.startswith(f"{known}."):
                return f" {origin}"
        return ""


def load_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """A preset by name or a TOML file, changed by `section.key=value` overrides.

    A file may build on a preset with `preset = "NAME"` on its first line.

    Raises:
        ConfigError: no such preset or file, not TOML, an unknown key (with the nearest one), a
            value of the wrong type or out of range; the message says where it comes from.
    """
    sources = ConfigSources()
    _read(str(name_or_path), sources)
    for text in overrides:
        sources.add(_override(text), "on the command line")
    return from_flat(sources)


def preset_names() -> list[str]:
    """Presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys; an empty one stays as it is."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing when no known name is close."""
    matches = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


def from_flat(sources: ConfigSources) -> TrainConfig:
    """The settings of dotted keys.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type or out of range.
    """
    sections = get_type_hints(TrainConfig)
    nested: dict[str, Any] = {name: {} for name in sections}
    for key, value in sources.values.items():
        *parents, name = key.split(".")
        if key in sections and value == {}:
            continue
        if not parents or parents[0] not in sections:
            raise ConfigError(_unknown(key, sources))
        table = nested
        for parent in parents:
            if not isinstance(table.get(parent), dict):
                table[parent] = {}
            table = table[parent]
        table[name] = value
    sections = {
        name: _section(name, kind, nested[name], sources) for name, kind in sections.items()
    }
    try:
        return TrainConfig(**sections)
    except ValidationError as error:
        raise ConfigError(str(error.errors()[0]["ctx"]["error"])) from None


def _section(name: str, kind: type[T], values: Mapping[str, Any], sources: ConfigSources) -> T:
    try:
        return kind(**values)
    except ValidationError as error:
        raise ConfigError(_message(name, error.errors()[0], sources)) from None


def _message(section: str, error: ErrorDetails, sources: ConfigSources) -> str:
    """One line about a value that pydantic refuses."""
    names = [section, *(str(part) for part in error["loc"] if isinstance(part, str))]
    if error["type"] == "unexpected_keyword_argument":
        return _unknown(".".join(names), sources)
    key = ".".join(names)
    if error["type"] == "hypernet":
        key = f"{key}.{error['ctx']['name']}"
        return f"{key}{sources.origin(key)} {error['msg']}"
    reason = error["msg"]
    for theirs, ours in _WORDS.items():
        reason = re.sub(theirs, ours, reason)
    return f"{key}{sources.origin(key)} {reason}, got {excerpt(error['input'])}"


# Pydantic's words -> ours.
_WORDS = {
    r"^\w+ should": "must",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "a valid boolean": "true or false",
    " after validation.*": "",
}


def _unknown(key: str, sources: ConfigSources) -> str:
    known = [
        f"{section}.{f.name}"
        for section, kind in get_type_hints(TrainConfig).items()
        for f in fields(kind)
    ]
    return f"unknown key {key}{sources.origin(key)}{did_you_mean(key, known)}"


def _override(text: str) -> dict[str, Any]:
    """`section.key=value`; the value is a TOML literal, or text where it is none."""
    key, equals, literal = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"{text!r} on the command line is not section.key=value")
    try:
        return {key: tomllib.loads(f"value = {literal}")["value"]}
    except (ValueError, RecursionError):
        return {key: literal.strip()}


def _read(name_or_path: str, sources: ConfigSources) -> None:
    packaged = PRESETS / f"{name_or_path}.toml"
    path = packaged if packaged.is_file() else Path(name_or_path)
    origin = f"in preset {name_or_path}" if path == packaged else f"in {path}"
    if not path.exists() or path.is_dir():
        hint = did_you_mean(name_or_path, preset_names())
        raise ConfigError(
            f"{name_or_path}: no such config file or preset{hint}; "
            f"presets: {', '.join(preset_names())}"
        )
    text = read_text(path, error=ConfigError)
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # Besides TOML's own errors: integers of thousands of digits, and nesting.
        raise ConfigError(f"{path}: not valid TOML ({error}); correct the file") from None
    parent = values.pop("preset", None)
    if parent is not None:
        if parent not in preset_names():
            hint = did_you_mean(str(parent), preset_names())
            raise ConfigError(f"{path}: no preset {parent!r}{hint}")
        _read(parent, sources)
    sources.add(values, origin)
