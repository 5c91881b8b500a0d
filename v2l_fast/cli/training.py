"""``v2l train``, and what prepares its data: ``transcode``, ``teach``, ``cache``, ``finevideo``."""

from __future__ import annotations

import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from typer import Argument, Option

from v2l_fast.cli.options import (
    CONTEXT,
    DEVICE,
    FORCE,
    JSON,
    MAX_NEW_TOKENS,
    SEED,
    FrameOptions,
    ManifestOptions,
    check_device,
    one_of,
    options,
    output_file,
    quiet_transformers,
    with_options,
)
from v2l_fast.console import note, print_outcome, progress_bar, say, show_json, waiting

if TYPE_CHECKING:
    from v2l_fast.data.readers import ClipReader

finevideo_app = typer.Typer(
    help="Training spans from FineVideo.", no_args_is_help=True, context_settings=CONTEXT
)


def train(
    overrides: list[str] | None = Argument(
        None, metavar="[SECTION.KEY=VALUE]...", help="Settings that override the config's."
    ),
    config: str = Option(
        "",
        "--config",
        "-c",
        help="A TOML file, or a preset: shapes, shapes-captions, shapes-varied, "
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


# --- training data --------------------------------------------------------------------------------


@options("Model")
class BaseOptions:
    """A frozen VLM alone."""

    base: str = Option("shapes-any", help="Frozen VLM: 'shapes-any' (shipped), a folder, a hub id.")
    device: str | None = DEVICE
    dtype: str | None = Option(
        None,
        help="float32 or bfloat16. By default, it depends on the device.",
        callback=one_of("float32", "bfloat16"),
    )


@options("Frames")
class ReadingOptions(FrameOptions):
    """How videos are read."""

    target_fps: float | None = Option(
        None, help="Frames per second, up to --max-frames. By default, as in training."
    )
    seconds: float = Option(60.0, min=0.001, help="Time limit in seconds for reading one file.")
    threads: int = Option(2, min=1, help="Threads that read videos ahead.")

    def reader(self, base: str) -> ClipReader:
        """A reader of the frames that hypernetworks for a base are trained with."""
        from v2l_fast.data.readers import ClipReader
        from v2l_fast.loading import training_sampling

        sampling = self.override(training_sampling(base)).override(target_fps=self.target_fps)
        return ClipReader(sampling, self.seconds)


@with_options
def teach(
    source: ManifestOptions,
    frames: ReadingOptions,
    teacher: BaseOptions,
    out_path: Path = Option(..., "--out", "-o", help="Folder of the answers and their manifest."),
    engine: str = Option(
        "hf", help="hf: in this process; ray: on a Ray cluster.", callback=one_of("hf", "ray")
    ),
    workers: int = Option(1, min=1, help="Processes of --engine ray."),
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch: int = Option(16, min=1, help="Prompts answered together."),
    shard: int = Option(
        32, min=1, help="Videos of a shard, the most that an interruption can cost."
    ),
    as_json: bool = JSON,
) -> None:
    """Write training targets: the frozen VLM's own answers with the video in its context.

    \b
    v2l teach --manifest clips.jsonl --out taught/ --base HuggingFaceTB/SmolVLM2-2.2B-Instruct
    v2l teach --manifest clips.jsonl --out /shared/taught --engine ray --workers 8

    The released checkpoints of both sizes learned from the 2.2B model's answers.

    By default, frames and resolution are those that hypernetworks for the base are trained with:
    those of the hypernetwork next to the base, else the paper's.

    Repeat the same command to continue after an interruption. The answers are in
    OUT/manifest.jsonl, videos that could not be read in OUT/quarantine.jsonl. With --engine ray,
    RAY_ADDRESS names the cluster (this machine if unset), and all its nodes must see OUT and the
    videos under the same paths.
    """
    from v2l_fast.data.teach import TeacherSettings
    from v2l_fast.data.teach import teach as run

    check_device(teacher.device)
    settings = TeacherSettings(
        base=teacher.base,
        reader=frames.reader(teacher.base),
        max_new_tokens=max_new_tokens,
        batch=batch,
        videos_per_shard=shard,
        device=teacher.device,
        dtype=teacher.dtype,
        threads=frames.threads,
    )
    quiet_transformers()
    with progress_bar("teaching") as report:
        progress = partial(report, "videos")
        result = run(source.manifest, out_path, settings, source.root, engine, workers, progress)
    print_outcome(
        f"{result.manifest}: {result.answers} answers",
        {"manifest": str(result.manifest), "answers": result.answers},
        result.failures,
        as_json,
    )


@with_options
def transcode(
    source: ManifestOptions,
    out_path: Path = Option(..., "--out", "-o", help="Folder of the copies and their manifest."),
    longest_edge: int = Option(
        384, min=2, help="Longest edge in pixels, at most 4096; smaller videos keep their size."
    ),
    keyframe_seconds: float = Option(1.0, min=0.001, help="Seconds from keyframe to keyframe."),
    seconds: float = Option(600.0, min=0.001, help="Time limit in seconds for one video."),
    threads: int = Option(2, min=1, help="Videos copied at the same time."),
    as_json: bool = JSON,
) -> None:
    """Copy videos or spans small and with frequent keyframes, so that training reads them fast.

    \b
    v2l finevideo build data/finevideo --out spans.jsonl --total 100000
    v2l transcode --manifest spans.jsonl --out small/
    v2l teach --manifest small/manifest.jsonl --out taught/ --base path/to/vlm

    A copy has the frames, times and duration of its span; its pixels differ slightly, because it is
    scaled by FFmpeg and compressed. --longest-edge should be the training's.

    Repeat the same command to continue after an interruption. The same examples about the copies
    are in OUT/manifest.jsonl, videos that could not be read in OUT/quarantine.jsonl.
    """
    from v2l_fast.data.transcode import TranscodeSettings
    from v2l_fast.data.transcode import transcode as run

    settings = TranscodeSettings(longest_edge, keyframe_seconds, seconds, threads)
    with progress_bar("copying") as report:
        progress = partial(report, "videos")
        result = run(source.manifest, out_path, settings, source.root, progress)
    print_outcome(
        f"{result.manifest}: {result.videos} videos, {result.bytes / 1e6:.1f} MB",
        {"manifest": str(result.manifest), "videos": result.videos, "bytes": result.bytes},
        result.failures,
        as_json,
    )


@with_options
def cache(
    source: ManifestOptions,
    frames: ReadingOptions,
    frozen: BaseOptions,
    folder: Path = Option(..., "--cache", help="Folder of the stored features."),
    chunks: list[int] | None = Option(None, help="Number of chunks of a video, repeatable."),
    as_json: bool = JSON,
) -> None:
    """Store connector outputs, so that training neither decodes videos nor runs the vision tower.

    \b
    v2l cache --manifest train.jsonl --cache features/ --base path/to/vlm
    v2l train --config my.toml data.feature_cache=features/

    By default, frames and resolution are those that hypernetworks for the base are trained with.
    They and the dtype must be the training's. Repeat the same command to continue after an
    interruption, or to add videos.
    """
    from v2l_fast.data.feature_cache import FeatureCache, fill_cache, vision_fingerprint
    from v2l_fast.data.manifest import group_by_video, load_manifest
    from v2l_fast.data.teach import REQUIRED, load_frozen
    from v2l_fast.outputs import check_folder

    check_folder(folder, inputs=[source.manifest])
    videos = group_by_video(load_manifest(source.manifest, source.root, required=REQUIRED))
    check_device(frozen.device)
    reader = frames.reader(frozen.base)
    quiet_transformers()
    with waiting(f"loading {frozen.base}"):
        backbone = load_frozen(frozen.base, frozen.device, frozen.dtype)
        features = FeatureCache(folder, reader, vision_fingerprint(backbone))
    with progress_bar("encoding") as report:
        failures = fill_cache(
            features,
            backbone,
            videos,
            tuple(chunks or [1]),
            threads=frames.threads,
            progress=partial(report, "videos"),
        )
    stored = len(videos) - len(failures)
    print_outcome(
        f"{folder}: {stored} of {len(videos)} videos stored",
        {"cache": str(folder), "videos": stored},
        failures,
        as_json,
    )


@finevideo_app.command("build")
def finevideo_build(
    folder: Path = Argument(..., help="Folder of <name>.mp4 and <name>.json pairs."),
    out_path: Path = Option(
        ..., "--out", "-o", help="The manifest (JSON lines).", parser=output_file
    ),
    total: int | None = Option(
        None, min=1, help="Number of spans. By default, as many as the mix allows."
    ),
    mix: tuple[float, float, float] = Option(
        (0.6, 0.3, 0.1), help="Shares of single scenes, adjacent scenes and whole videos."
    ),
    questions: int = Option(0, min=0, help="Questions of the metadata for each whole video."),
    val_share: float = Option(0.01, help="Share of the videos that validate the training."),
    seed: int = SEED,
    force: bool = FORCE,
    as_json: bool = JSON,
) -> None:
    """Write a manifest of spans (scenes, adjacent scenes, whole videos) without answers.

    \b
    v2l finevideo build data/finevideo --out spans.jsonl --total 100000
    v2l teach --manifest spans.jsonl --out taught/ --base HuggingFaceTB/SmolVLM2-2.2B-Instruct
    v2l train --config smolvlm2-500m 'data.manifests=["taught/manifest.jsonl"]'
    """
    from v2l_fast.data.finevideo import MIX, build_manifest
    from v2l_fast.outputs import check_output

    if min(mix) < 0 or not sum(mix):
        raise typer.BadParameter("--mix takes three shares, none negative, not all 0")
    if not 0 <= val_share < 1:
        raise typer.BadParameter(f"--val-share must be at least 0 and below 1, got {val_share}")
    check_output(out_path, (p for p in folder.glob("*") if p.suffix in (".json", ".mp4")), force)
    shares = dict(zip(MIX, mix, strict=True))
    result = build_manifest(folder, out_path, total, shares, val_share, questions, seed)
    counts = {p: sum(row["metadata"]["pool"] == p for row in result.rows) for p in MIX}
    if as_json:
        show_json(
            {
                "manifest": str(out_path),
                "rows": len(result.rows),
                "pools": counts,
                "videos": result.pools.videos,
                "left_out": dict(result.pools.left_out),
            }
        )
        return
    pools = ", ".join(f"{count} {pool}" for pool, count in counts.items())
    say(f"{out_path}: {len(result.rows)} rows ({pools}) of {result.pools.videos} videos")
    for name, reason in result.pools.left_out.items():
        note(f"left out: {name}: {reason}")
