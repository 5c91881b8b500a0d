"""``v2l evaluate`` and ``v2l manifest``: a model on a manifest, a published benchmark as one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from typer import Argument, Option

from v2l_fast.cli.options import (
    FORCE,
    JSON,
    MAX_NEW_TOKENS,
    SEED,
    ExampleOptions,
    FrameOptions,
    ModelOptions,
    options,
    output_file,
    with_options,
)
from v2l_fast.console import progress_bar, say, show, show_json

if TYPE_CHECKING:
    from v2l_fast.evaluation.judge import Judge


@options("Judge")
class JudgeOptions:
    """A language model that scores the answers."""

    judge: str | None = Option(
        None, help="OpenAI-compatible API, such as http://localhost:8000/v1."
    )
    judge_model: str = Option(
        "Qwen/Qwen3-VL-30B-A3B-Thinking-FP8",
        help="Name that the judge is served under. By default, the paper's.",
    )
    judge_pairs: bool = Option(False, "--judge-pairs", help="Also judge both answers side by side.")
    judge_tokens: int = Option(
        1024, min=1, help="Maximum tokens of a reply, including its thoughts."
    )
    judge_workers: int = Option(8, min=1, help="Concurrent requests.")
    judge_json: bool = Option(
        True, help="Ask the judge's server for JSON, which some do not support."
    )
    judge_prices: tuple[float, float] = Option(
        (0.0, 0.0), help="Dollars per million input and output tokens."
    )

    def create(self, cache: Path) -> Judge | None:
        """The judge, if there is one; its judgments are kept in a file."""
        from v2l_fast.evaluation.judge import Judge, JudgeSettings

        if self.judge is None:
            return None
        settings = JudgeSettings(
            self.judge,
            self.judge_model,
            max_tokens=self.judge_tokens,
            workers=self.judge_workers,
            json_mode=self.judge_json,
            prices=self.judge_prices,
        )
        return Judge(settings, cache)


@with_options
def evaluate(
    source: ExampleOptions,
    frames: FrameOptions,
    loading: ModelOptions,
    judging: JudgeOptions,
    folder: Path | None = Option(
        None, "--out", "-o", help="Folder of the results. By default, runs/evaluate-MANIFEST."
    ),
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch: int = Option(16, min=1, help="Examples answered together."),
    as_json: bool = JSON,
) -> None:
    """Compare the video in context with its adapter, and with controls, on a manifest.

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
    from v2l_fast.outputs import check_folder

    folder = folder or Path("runs") / f"evaluate-{source.manifest.stem}"
    check_folder(folder)
    examples = load_manifest(source.manifest, source.root, source.split)
    judge = judging.create(folder / "judgments.jsonl")
    model = loading.load()
    sampling = frames.override(model.config.sampling)
    reader = ClipReader(sampling, seconds=600.0)
    with progress_bar("evaluating") as progress:
        result = run(
            model,
            examples,
            AnswerSettings(sampling, max_new_tokens),
            load=lambda video: reader.read(video)[0],
            folder=folder,
            judge=judge,
            pairs=judging.judge_pairs,
            batch=batch,
            progress=progress,
        )
    if as_json:
        show_json(result.record)
        return
    show(result.table)
    for path in result.files:
        say(str(path))


def manifest(
    benchmark: str = Argument(
        ...,
        help="activitynet-captions, plm-rdcap, plm-rcap, vdc, carebench, nextqa, "
        "activitynet-qa, plm-sgqa or vidcapbench.",
    ),
    folder: Path = Argument(
        ..., help="Folder with the annotation files and, anywhere in it, videos."
    ),
    out_path: Path = Option(
        ..., "--out", "-o", help="The manifest (JSON lines).", parser=output_file
    ),
    limit: int | None = Option(
        None,
        min=0,
        help="Examples of each subset (videos of vidcapbench); 0 for all. By default, the "
        "paper's number: 500 (100).",
    ),
    seed: int = SEED,
    skip_missing: bool = Option(
        False, "--skip-missing", help="Leave out examples whose video is missing."
    ),
    force: bool = FORCE,
    as_json: bool = JSON,
) -> None:
    """Write the manifest of a published benchmark from its files.

    \b
    v2l manifest vdc data/vdc --out data/vdc.jsonl
    v2l manifest activitynet-qa data/anet --out anet-qa.jsonl --skip-missing
    """
    from v2l_fast.evaluation.benchmark_manifests import build
    from v2l_fast.outputs import check_output

    check_output(out_path, force=force)
    result = build(benchmark, folder, out_path, limit, seed, skip_missing)
    if as_json:
        show_json(
            {
                "manifest": str(out_path),
                "examples": result.examples,
                "videos": result.videos,
                "missing": list(result.missing),
            }
        )
        return
    left_out = f", {len(result.missing)} videos are missing" if result.missing else ""
    say(f"{out_path}: {result.examples} examples about {result.videos} videos{left_out}")
