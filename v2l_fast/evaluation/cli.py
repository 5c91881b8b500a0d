"""Commands of the evaluation: build a benchmark's manifest, evaluate a model on a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from v2l_fast.options import (
    Base,
    Device,
    Dtype,
    ExactFrames,
    Json,
    LongestEdge,
    Manifest,
    MaxFrames,
    MaxNewTokens,
    Model,
    Root,
    Split,
    load_model,
    out,
    progress_bar,
)

app = typer.Typer()


@app.command()
def manifest(
    benchmark: Annotated[
        str,
        typer.Argument(
            help="activitynet-captions, plm-rdcap, plm-rcap, vdc, carebench, nextqa, "
            "activitynet-qa, plm-sgqa or vidcapbench."
        ),
    ],
    folder: Annotated[
        Path, typer.Argument(help="Has the annotation files and, anywhere below it, the videos.")
    ],
    out_path: Annotated[Path, typer.Option("--out", "-o", help="The manifest (JSONL).")],
    limit: Annotated[
        int | None,
        typer.Option(help="Examples of each subset (videos of vidcapbench); 0 for all. The "
                     "paper's number if omitted: 500 (100)."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice.")] = 0,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out examples whose video is not there.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the manifest of a published benchmark from its files.

    \b
    v2l manifest vdc data/vdc --out data/vdc.jsonl
    v2l manifest activitynet-qa data/anet --out anet-qa.jsonl --skip-missing
    """
    from v2l_fast.evaluation.benchmarks.build import build

    found = build(benchmark, folder, out_path, limit, seed, skip_missing)
    if as_json:
        out.print_json(
            data={
                "manifest": str(out_path),
                "examples": found.examples,
                "videos": found.videos,
                "missing": list(found.missing),
            }
        )
        return
    left_out = f", {len(found.missing)} videos are not there" if found.missing else ""
    out.print(
        f"{out_path}: {found.examples} examples about {found.videos} videos{left_out}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def evaluate(
    manifest_path: Manifest,
    folder: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the results; runs/evaluate-<manifest>."),
    ] = None,
    root: Root = None,
    split: Split = None,
    judge: Annotated[
        str | None, typer.Option(help="OpenAI-compatible API, such as http://localhost:8000/v1.")
    ] = None,
    judge_model: Annotated[
        str, typer.Option(help="Name the judge is served under; the paper's if omitted.")
    ] = "Qwen/Qwen3-VL-30B-A3B-Thinking-FP8",
    judge_pairs: Annotated[
        bool, typer.Option("--judge-pairs", help="Also judge both answers side by side.")
    ] = False,
    judge_tokens: Annotated[
        int, typer.Option(help="Longest reply of the judge, its thoughts included.", min=1)
    ] = 1024,
    judge_workers: Annotated[int, typer.Option(help="Requests to the judge at a time.")] = 8,
    judge_json: Annotated[
        bool, typer.Option(help="Ask the judge's server for JSON; some do not know that.")
    ] = True,
    judge_prices: Annotated[
        tuple[float, float], typer.Option(help="Dollars per million input and output tokens.")
    ] = (0.0, 0.0),
    max_frames: MaxFrames = None,
    longest_edge: LongestEdge = None,
    exact_frames: ExactFrames = False,
    max_new_tokens: MaxNewTokens = 128,
    batch: Annotated[int, typer.Option(help="Examples answered at a time.", min=1)] = 16,
    model: Model = "shapes",
    base: Base = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Compare the video in context with its adapter, and controls, on a manifest.

    All conditions see the same videos, prompts and frames and answer greedily. An interrupted
    evaluation continues when the same command is given again.

    \b
    v2l shapes render clips --count 64 && v2l evaluate --manifest clips/manifest.jsonl
    v2l evaluate --manifest vdc.jsonl --model hypernet-500m/ --judge http://localhost:8000/v1
    """
    from v2l_fast.evaluation.endpoint import JudgeSettings
    from v2l_fast.evaluation.judge import Judge
    from v2l_fast.evaluation.library import Settings
    from v2l_fast.evaluation.pipeline import evaluate as run
    from v2l_fast.training.manifest import load_manifest
    from v2l_fast.training.reading import ClipReader

    examples = load_manifest(manifest_path, root, split)
    folder = folder or Path("runs") / f"evaluate-{manifest_path.stem}"
    judging = None
    if judge is not None:
        settings = JudgeSettings(
            judge,
            judge_model,
            max_tokens=judge_tokens,
            workers=judge_workers,
            json_mode=judge_json,
            prices=judge_prices,
        )
        judging = Judge(settings, folder / "judgments.jsonl")
    loaded = load_model(model, base, device, dtype)
    reader = ClipReader(
        loaded.config.max_frames if max_frames is None else max_frames,
        loaded.config.longest_edge if longest_edge is None else longest_edge,
        loaded.config.target_fps,
        exact_frames,
        seconds=600.0,
    )
    with progress_bar("evaluating") as progress:
        found = run(
            loaded,
            examples,
            Settings(reader.max_frames, reader.longest_edge, exact_frames, max_new_tokens),
            load=lambda video: reader.read(video)[0],
            folder=folder,
            judge=judging,
            pairs=judge_pairs,
            batch=batch,
            progress=progress,
        )
    if as_json:
        out.print_json(data=found.record)
        return
    out.print(found.table, highlight=False, markup=False, soft_wrap=True)
    for path in found.files:
        out.print(str(path), highlight=False, soft_wrap=True)
