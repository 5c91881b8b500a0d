"""Commands of the evaluation: build a benchmark's manifest, evaluate a model on a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from v2l_fast.cli.options import (
    Base,
    Device,
    Dtype,
    ExactFrames,
    Force,
    Json,
    LongestEdge,
    Manifest,
    MaxFrames,
    MaxNewTokens,
    Model,
    Root,
    Seed,
    Split,
    load_model,
    output_file,
)
from v2l_fast.console import progress_bar, say, show, show_json

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
    out_path: Annotated[
        Path, typer.Option("--out", "-o", help="The manifest (JSONL).", parser=output_file)
    ],
    limit: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Examples of each subset (videos of vidcapbench); 0 for all. The "
            "paper's number if omitted: 500 (100).",
        ),
    ] = None,
    seed: Seed = 0,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out examples whose video is missing.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the manifest of a published benchmark from its files.

    \b
    v2l manifest vdc data/vdc --out data/vdc.jsonl
    v2l manifest activitynet-qa data/anet --out anet-qa.jsonl --skip-missing
    """
    from v2l_fast.evaluation.benchmarks.build import build
    from v2l_fast.outputs import check_output

    check_output(out_path, force=force)
    found = build(benchmark, folder, out_path, limit, seed, skip_missing)
    if as_json:
        show_json(
            {
                "manifest": str(out_path),
                "examples": found.examples,
                "videos": found.videos,
                "missing": list(found.missing),
            }
        )
        return
    left_out = f", {len(found.missing)} videos are missing" if found.missing else ""
    say(f"{out_path}: {found.examples} examples about {found.videos} videos{left_out}")


@app.command()
def evaluate(
    manifest_path: Manifest,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder of the results; runs/evaluate-MANIFEST if omitted."
        ),
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
    judge_workers: Annotated[int, typer.Option(min=1, help="Requests to the judge at a time.")] = 8,
    judge_json: Annotated[
        bool, typer.Option(help="Ask the judge's server for JSON; some servers cannot.")
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

    All conditions see the same videos, prompts and frames and answer greedily. Repeat the same
    command to continue after an interruption.

    \b
    v2l shapes render clips --count 64 && v2l evaluate --manifest clips/manifest.jsonl
    v2l evaluate --manifest vdc.jsonl --model hypernet-500m/ --judge http://localhost:8000/v1
    """
    from v2l_fast.data.manifest import load_manifest
    from v2l_fast.data.readers import ClipReader
    from v2l_fast.evaluation.answers import AnswerSettings
    from v2l_fast.evaluation.evaluate import evaluate as run
    from v2l_fast.evaluation.judge import Judge, JudgeSettings
    from v2l_fast.outputs import check_folder

    folder = folder or Path("runs") / f"evaluate-{manifest_path.stem}"
    check_folder(folder)
    examples = load_manifest(manifest_path, root, split)
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
    sampling = loaded.config.sampling.override(max_frames, longest_edge, exact_frames=exact_frames)
    reader = ClipReader.of(sampling, seconds=600.0)
    with progress_bar("evaluating") as progress:
        found = run(
            loaded,
            examples,
            AnswerSettings(reader.max_frames, reader.longest_edge, exact_frames, max_new_tokens),
            load=lambda video: reader.read(video)[0],
            folder=folder,
            judge=judging,
            pairs=judge_pairs,
            batch=batch,
            progress=progress,
        )
    if as_json:
        show_json(found.record)
        return
    show(found.table)
    for path in found.files:
        say(str(path))
