"""Settings of a training run: nested frozen dataclasses, TOML presets and `key=value` overrides.

Responsible for what a run can be told and for refusing what cannot work before anything is loaded.
Reading values by their declared types is `config_values`'; what the settings mean is carried out
by the trainer, the step and the data source.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from v2l_fast.errors import ConfigError
from v2l_fast.files import read_text
from v2l_fast.hypernet.config import INSTRUCTION, HypernetConfig
from v2l_fast.training.config_values import ConfigSources, build, nearest, parse_overrides, spread
from v2l_fast.video.reading import BACKENDS
from v2l_fast.video.sampling import MAX_EDGE

PRESETS = Path(__file__).parent / "presets"
DERIVED = ("hidden_size", "num_layers", "base_model_name_or_path")
FROM_DATA = ("max_frames", "longest_edge", "target_fps", "instruction")


@dataclass(frozen=True)
class ModelConfig:
    """The frozen model and the hypernetwork.

    Attributes:
        base: folder or hub id of the frozen VLM; "" where the data source makes its own.
        hypernet: fields of `HypernetConfig` that differ from its defaults; `target_modules` is a
            list of names. Sizes come from the base, the sampling fields from `data`.
        init: a hypernetwork to start from (folder, hub id or released .pt); "" for a fresh one.
        dtype: of the frozen model and of all computing, "float32" or "bfloat16"; "auto" is
            bfloat16 on a GPU. The hypernetwork's own parameters are always float32.
        recompute: redo each layer's activations in the backward pass, so that memory does not
            grow with the number of layers.
    """

    base: str = ""
    hypernet: Mapping[str, Any] = field(default_factory=dict)
    init: str = ""
    dtype: str = "auto"
    recompute: bool = True


@dataclass(frozen=True)
class DataConfig:
    """Videos and how they are read.

    Attributes:
        source: "manifest" (JSONL files) or "shapes" (the rendered toy world).
        manifests, val_manifests: JSONL files; without the second, `val_share` of the videos of
            the first are kept from training.
        videos: at most so many training videos; 0 for all.
        val_videos: videos of a validation pass; 0 for none.
        prompts_per_video: turns that share a video's encoding in one step.
        caption_share: share of those turns that describe the whole video, in the mean, where a
            video has captions and questions both.
        max_frames, longest_edge, target_fps, exact_frames: sampling and resolution (pixels).
        instruction: the text that follows the video in the context pass.
        chunks: numbers of chunks a video is cut into; each step draws one of them for each video.
        feature_cache: folder of stored connector outputs; "" for none.
        answer_length_tags: questions say how long their answer is.
        decoder: "pyav", "torchcodec" or "dali", which reads what it can; "auto" is DALI on a GPU
            and PyAV for the rest.
        workers: processes that read videos ahead of the step, threads where a GPU decodes; 0 reads
            in the step.
        prefetch: batches each worker is ahead.
    """

    source: str = "manifest"
    manifests: tuple[str, ...] = ()
    val_manifests: tuple[str, ...] = ()
    val_share: float = 0.01
    videos: int = 0
    val_videos: int = 64
    prompts_per_video: int = 4
    caption_share: float = 0.5
    max_frames: int = 12
    longest_edge: int = 384
    target_fps: float = 1.0
    exact_frames: bool = False
    instruction: str = INSTRUCTION
    chunks: tuple[int, ...] = (1,)
    feature_cache: str = ""
    answer_length_tags: bool = False
    decoder: str = "auto"
    workers: int = 4
    prefetch: int = 2


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule.

    Attributes:
        steps: optimizer steps.
        batch_size: videos of one step over all processes and accumulated micro-batches.
        micro_batch_size: most videos of one forward pass on one process.
        lr, betas, eps, weight_decay: of AdamW.
        scaler_lr_factor, scaler_weight_decay: the scalers' own rate (times `lr`) and decay.
        schedule: "cosine" to `final_lr_ratio`, or "trapezoid" (flat, then linear to it).
        warmup_ratio: share of the steps the rate rises linearly; `warmup_steps` replaces it.
        decay_ratio: share of the steps in which a trapezoid falls.
        clip: largest norm of the gradient; 0 for no limit.
    """

    steps: int = 1000
    batch_size: int = 8
    micro_batch_size: int = 8
    lr: float = 1e-4
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    scaler_lr_factor: float = 1.0
    scaler_weight_decay: float = 0.01
    schedule: str = "cosine"
    warmup_ratio: float = 0.03
    warmup_steps: int = 0
    decay_ratio: float = 0.4
    final_lr_ratio: float = 0.0
    clip: float = 1.0

    def accumulation(self, processes: int) -> int:
        """Micro-batches a process adds up in one step, the same number for all.

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


@dataclass(frozen=True)
class LossConfig:
    """What is minimized: cross-entropy, mean per answer and then over answers.

    Attributes:
        kind_weights: weight of a task kind within its video (kinds share their weight equally
            between their turns, and a video's weights sum to 1); empty: every answer counts once.
        kl_weight, kl_temperature: KL to the frozen model that sees the video; weight 0 is off.
    """

    kind_weights: Mapping[str, float] = field(default_factory=dict)
    kl_weight: float = 0.0
    kl_temperature: float = 1.0


@dataclass(frozen=True)
class RunConfig:
    """The run around the training; none of this changes what is learned, but for the seed.

    Attributes:
        folder: of checkpoints, logs, `hypernet/` (the latest loadable one), `best/` (that of the
            lowest validation cross-entropy) and `summary.json`; all machines of a run share it.
        seed: of initialization, order and every choice the data source makes.
        device: "auto", "cuda" or "cpu".
        threads: of the CPU's operators; 0 leaves them as they are.
        compile: "auto" (on a GPU), "on" or "off".
        log_every, checkpoint_every, val_every, sample_every: in steps; 0 is never (checkpoints and
            validation also come at the end).
        samples: answers generated for `sample_every`.
        keep: checkpoints kept.
        export_dtype: of `hypernet/`.
        trackers: of "tensorboard" and "wandb".
        name: the run's name in trackers; that of the folder if empty.
    """

    folder: str = "runs/train"
    seed: int = 0
    device: str = "auto"
    threads: int = 0
    compile: str = "auto"
    log_every: int = 10
    checkpoint_every: int = 250
    val_every: int = 250
    sample_every: int = 500
    samples: int = 4
    keep: int = 2
    export_dtype: str = "float32"
    trackers: tuple[str, ...] = ("tensorboard",)
    name: str = ""


CHOICES = {
    "data.source": ("manifest", "shapes"),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "data.decoder": BACKENDS,
    "optim.schedule": ("cosine", "trapezoid"),
    "run.device": ("auto", "cuda", "cpu"),
    "run.compile": ("auto", "on", "off"),
    "run.export_dtype": ("float32", "bfloat16"),
    "run.trackers": ("tensorboard", "wandb"),
}
LEAST = {
    "data.videos": 0, "data.val_videos": 0, "data.prompts_per_video": 1, "data.max_frames": 1,
    "data.longest_edge": 2, "data.workers": 0, "data.prefetch": 1, "data.chunks": 1,
    "data.val_share": 0, "data.caption_share": 0,
    "optim.steps": 1, "optim.batch_size": 1, "optim.micro_batch_size": 1,
    "optim.lr": 0, "optim.betas": 0, "optim.eps": 0, "optim.weight_decay": 0,
    "optim.scaler_lr_factor": 0, "optim.scaler_weight_decay": 0, "optim.warmup_ratio": 0,
    "optim.warmup_steps": 0, "optim.decay_ratio": 0, "optim.final_lr_ratio": 0, "optim.clip": 0,
    "loss.kl_weight": 0, "run.seed": 0, "run.threads": 0, "run.log_every": 1,
    "run.checkpoint_every": 0,
    "run.val_every": 0, "run.sample_every": 0, "run.samples": 1, "run.keep": 1,
}  # fmt: skip
MOST = {
    "optim.warmup_ratio": 1, "optim.decay_ratio": 1, "optim.final_lr_ratio": 1, "optim.betas": 1,
    "data.val_share": 0.5, "data.caption_share": 1, "data.longest_edge": MAX_EDGE,
    # The generator of every step is seeded with a multiple of it.
    "run.seed": 2**32 - 1,
}  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """Everything about a run.

    Raises:
        ConfigError: a value is out of range; the message names it and what is allowed.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        flat = spread(asdict(self))
        for key, allowed in CHOICES.items():
            for value in _each(flat[key]):
                if value not in allowed:
                    raise ConfigError(f"{key} must be one of {', '.join(allowed)}, not {value!r}")
        for limits, word, wrong in (
            (LEAST, "at least", lambda value, limit: not value >= limit),
            (MOST, "at most", lambda value, limit: not value <= limit),
        ):
            for key, limit in limits.items():
                for value in _each(flat[key]):
                    if wrong(value, limit):
                        raise ConfigError(f"{key} must be {word} {limit}, not {value!r}")
        if not self.run.folder.strip():
            raise ConfigError("run.folder is empty; name the folder of the run")
        if len(self.optim.betas) != 2:
            raise ConfigError(f"optim.betas must be two numbers, not {list(self.optim.betas)}")
        if not self.data.chunks:
            raise ConfigError("data.chunks is empty; [1] takes every video in one piece")
        for name, weight in self.loss.kind_weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or weight < 0:
                raise ConfigError(f"loss.kind_weights.{name} must be a weight, not {weight!r}")
        if self.loss.kl_weight and (self.data.source != "manifest" or max(self.data.chunks) > 1):
            raise ConfigError(
                f"loss.kl_weight={self.loss.kl_weight} needs a teacher that sees each video in one "
                "piece: data.source=manifest and data.chunks=[1]; or set it to 0"
            )
        _check_hypernet(dict.fromkeys(self.model.hypernet, ""))

    def identity(self) -> dict[str, Any]:
        """What decides the result, by dotted name: a checkpoint continues only under the same."""
        free = {
            "optim.micro_batch_size", "data.workers", "data.prefetch", "data.feature_cache",
            "data.val_manifests", "data.val_videos", "model.init", "model.recompute",
        }  # fmt: skip
        flat = spread(asdict(self)).items()
        kept = {k: v for k, v in flat if k not in free and not k.startswith("run.")}
        return {**kept, "run.seed": self.run.seed}


def load_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """A preset by name or a TOML file, changed by `section.key=value` overrides.

    A file may build on a preset with `preset = "NAME"` on its first line.

    Raises:
        ConfigError: no such preset or file, not TOML, an unknown key (with the nearest one), a
            value of the wrong type or out of range; the message says where it was given.
    """
    given = ConfigSources()
    _read(str(name_or_path), given)
    parse_overrides(overrides, given)
    section = "model.hypernet."
    _check_hypernet(
        {
            key.removeprefix(section): f" in {where}"
            for key, where in given.origins.items()
            if key.startswith(section)
        }
    )
    return build(TrainConfig, given)


def preset_names() -> list[str]:
    """Presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def _read(name_or_path: str, given: ConfigSources) -> None:
    packaged = PRESETS / f"{name_or_path}.toml"
    path = packaged if packaged.is_file() else Path(name_or_path)
    where = f"preset {name_or_path}" if path == packaged else str(path)
    try:
        if not path.exists() or path.is_dir():
            raise FileNotFoundError
        values = tomllib.loads(read_text(path, error=ConfigError))
    except FileNotFoundError:
        hint = nearest(name_or_path, preset_names())
        raise ConfigError(
            f"{name_or_path}: no such config file or preset{hint}; "
            f"presets: {', '.join(preset_names())}"
        ) from None
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        # Besides TOML's own errors: integers of thousands of digits, and nesting.
        raise ConfigError(f"{path}: not valid TOML ({error}); correct the file") from None
    parent = values.pop("preset", None)
    if parent is not None:
        if parent not in preset_names():
            hint = nearest(str(parent), preset_names())
            raise ConfigError(f"{path}: no preset {parent!r}{hint}")
        _read(parent, given)
    given.add(values, where)


def _each(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _check_hypernet(given: Mapping[str, str]) -> None:
    """given: field of `model.hypernet` -> words that say where it was given."""
    free = [f.name for f in fields(HypernetConfig) if f.name not in (*DERIVED, *FROM_DATA)]
    for name, where in given.items():
        if name in DERIVED:
            raise ConfigError(f"model.hypernet.{name}{where} is the base's own; leave it out")
        if name in FROM_DATA:
            raise ConfigError(f"model.hypernet.{name}{where} is set by data.{name}")
        if name not in free:
            raise ConfigError(f"unknown key model.hypernet.{name}{where}{nearest(name, free)}")
