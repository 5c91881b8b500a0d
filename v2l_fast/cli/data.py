"""`v2l teach`, `v2l cache` and `v2l finevideo`: training data made ready."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from v2l_fast.cli.options import (
    Device,
    ExactFrames,
    Force,
    Json,
    LongestEdge,
    Manifest,
    MaxFrames,
    Root,
    Seed,
    check_device,
    output_file,
    quiet_transformers,
)
from v2l_fast.console import note, progress_bar, say, show_json, waiting

if TYPE_CHECKING:
    from v2l_fast.data.readers import ClipReader
    from v2l_fast.data.samples import Failure

finevideo_app = typer.Typer(help="Training spans from FineVideo.", no_args_is_help=True)

Base = Annotated[str, typer.Option(help="Frozen VLM: 'shapes' (shipped), a folder or a hub id.")]
TargetFps = Annotated[
    float | None,
    typer.Option(help="Frames a second, up to --max-frames; as in training if omitted."),
]
Seconds = Annotated[
    float, typer.Option(min=0.001, help="Longest time in seconds that one file may take to read.")
]
Threads = Annotated[int, typer.Option(min=1, help="Threads that read videos ahead.")]


def _known_dtype(name: str | None) -> str | None:
    if name not in (None, "float32", "bfloat16"):
        raise typer.BadParameter(f"must be float32 or bfloat16, got {name}")
    return name


Dtype = Annotated[
    str | None,
    typer.Option(help="float32 or bfloat16; by device if omitted.", callback=_known_dtype),
]


def teach_command(
    manifest: Manifest,
    out_path: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the answers and their manifest.")
    ],
    base: Base = "shapes",
    root: Root = None,
    engine: Annotated[str, typer.Option(help="hf: in this process; ray: on a Ray cluster.")] = "hf",
    workers: Annotated[int, typer.Option(min=1, help="Processes of --engine ray.")] = 1,
    max_frames: MaxFrames = None,
    longest_edge: LongestEdge = None,
    target_fps: TargetFps = None,
    exact_frames: ExactFrames = False,
    seconds: Seconds = 60.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Prompts answered together.")] = 16,
    shard: Annotated[
        int, typer.Option(min=1, help="Videos of a shard: what an interruption can cost.")
    ] = 32,
    threads: Threads = 2,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Write training targets: the frozen VLM's own answers with the video in its context.

    \b
    v2l teach --manifest clips.jsonl --out taught/ --base HuggingFaceTB/SmolVLM2-2.2B-Instruct
    v2l teach --manifest clips.jsonl --out /shared/taught --engine ray --workers 8

    The released checkpoints of both sizes learned from the 2.2B model's answers.

    Frames and resolution are those that hypernetworks for the base are trained with, unless they
    are given: those of the hypernetwork beside the base, else the paper's.

    Repeat the same command to continue after an interruption. The answers are in
    OUT/manifest.jsonl, videos that could not be read in OUT/quarantine.jsonl. With --engine ray,
    RAY_ADDRESS names the cluster (this machine if unset), and all its nodes must see OUT and the
    videos under the same paths.
    """
    from v2l_fast.data.teach import TeacherSettings, teach

    if engine not in ("hf", "ray"):
        raise typer.BadParameter(f"--engine must be hf or ray, got {engine}")
    check_device(device)
    settings = TeacherSettings(
        base=base,
        reader=_reader(base, max_frames, longest_edge, target_fps, exact_frames, seconds),
        max_new_tokens=max_new_tokens,
        batch=batch,
        videos_per_shard=shard,
        device=device,
        dtype=dtype,
        threads=threads,
    )
    quiet_transformers()
    with progress_bar("teaching") as report:
        progress = partial(report, "videos")
        taught = teach(manifest, out_path, settings, root, engine, workers, progress)
    print_outcome(
        f"{taught.manifest}: {taught.answers} answers",
        {"manifest": str(taught.manifest), "answers": taught.answers},
        taught.failures,
        as_json,
    )


def cache_command(
    manifest: Manifest,
    cache: Annotated[Path, typer.Option("--cache", help="Folder of the stored features.")],
    base: Base = "shapes",
    root: Root = None,
    chunks: Annotated[
        list[int] | None, typer.Option(help="Number of chunks of a video; may be repeated.")
    ] = None,
    max_frames: MaxFrames = None,
    longest_edge: LongestEdge = None,
    target_fps: TargetFps = None,
    exact_frames: ExactFrames = False,
    seconds: Seconds = 60.0,
    threads: Threads = 2,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Store connector outputs, so that training neither decodes videos nor runs the vision tower.

    \b
    v2l cache --manifest train.jsonl --cache features/ --base path/to/vlm
    v2l train --config my.toml data.feature_cache=features/

    Frames and resolution are those that hypernetworks for the base are trained with, unless they
    are given; they and the dtype must be the training's. Repeat the same command to continue after
    an interruption, or to add videos.
    """
    from v2l_fast.data.feature_cache import FeatureCache, fill_cache, vision_fingerprint
    from v2l_fast.data.manifest import group_by_video, load_manifest
    from v2l_fast.data.teach import REQUIRED, load_frozen
    from v2l_fast.outputs import check_folder

    check_folder(cache, inputs=[manifest])
    videos = group_by_video(load_manifest(manifest, root, required=REQUIRED))
    check_device(device)
    reader = _reader(base, max_frames, longest_edge, target_fps, exact_frames, seconds)
    quiet_transformers()
    with waiting(f"loading {base}"):
        backbone = load_frozen(base, device, dtype)
        stored = FeatureCache(cache, reader, vision_fingerprint(backbone))
    with progress_bar("encoding") as report:
        failures = fill_cache(
            stored,
            backbone,
            videos,
            tuple(chunks or [1]),
            threads=threads,
            progress=partial(report, "videos"),
        )
    print_outcome(
        f"{cache}: {len(videos) - len(failures)} of {len(videos)} videos stored",
        {"cache": str(cache), "videos": len(videos) - len(failures)},
        failures,
        as_json,
    )


@finevideo_app.command("build")
def finevideo_build(
    folder: Annotated[Path, typer.Argument(help="Has <name>.mp4 and <name>.json pairs.")],
    out_path: Annotated[
        Path, typer.Option("--out", "-o", help="The manifest (JSONL).", parser=output_file)
    ],
    total: Annotated[
        int | None, typer.Option(min=1, help="Spans; as many as the mix allows if omitted.")
    ] = None,
    mix: Annotated[
        tuple[float, float, float],
        typer.Option(help="Shares of single scenes, adjacent scenes and whole videos."),
    ] = (0.6, 0.3, 0.1),
    questions: Annotated[
        int, typer.Option(min=0, help="The metadata's questions, so many for a whole video.")
    ] = 0,
    val_share: Annotated[float, typer.Option(help="Share of the videos kept to validate.")] = 0.01,
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
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
    built = build_manifest(folder, out_path, total, shares, val_share, questions, seed)
    counts = {p: sum(row["metadata"]["pool"] == p for row in built.rows) for p in MIX}
    if as_json:
        show_json(
            {
                "manifest": str(out_path),
                "rows": len(built.rows),
                "pools": counts,
                "videos": built.pools.videos,
                "left_out": dict(built.pools.left_out),
            }
        )
        return
    pools = ", ".join(f"{count} {pool}" for pool, count in counts.items())
    say(f"{out_path}: {len(built.rows)} rows ({pools}) of {built.pools.videos} videos")
    for name, reason in built.pools.left_out.items():
        note(f"left out: {name}: {reason}")


# --- shared by the commands -----------------------------------------------------------------------


def _reader(
    base: str,
    max_frames: int | None,
    longest_edge: int | None,
    target_fps: float | None,
    exact_frames: bool,
    seconds: float,
) -> ClipReader:
    from v2l_fast.data.readers import ClipReader
    from v2l_fast.loading import training_sampling

    sampling = training_sampling(base)
    return ClipReader.of(
        sampling.override(max_frames, longest_edge, target_fps, exact_frames), seconds
    )


def print_outcome(line: str, data: dict, failures: list[Failure], as_json: bool) -> None:
    """The result, and what was left out, which is no failure of the command."""
    if as_json:
        show_json(data | {"failures": [dataclasses.asdict(f) for f in failures]})
        return
    say(line)
    for failure in failures:
        note(f"left out: {failure.reason}")
