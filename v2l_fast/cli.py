"""Command line: parses, calls, prints. What a command does lives in the library.

Exit codes: 0 done, 1 failed (one line says what and how to go on), 2 wrong usage.
"""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

import v2l_fast
from v2l_fast.analysis.cli import app as analyze_app
from v2l_fast.analysis.cli import sweep
from v2l_fast.errors import ConfigError, V2LError
from v2l_fast.evaluation.cli import app as evaluation_app
from v2l_fast.options import (
    Base,
    Device,
    Dtype,
    ExactFrames,
    Json,
    LongestEdge,
    MaxFrames,
    MaxNewTokens,
    Model,
    load_model,
    log,
    out,
    progress_bar,
    quiet_transformers,
)
from v2l_fast.serving.cli import serve
from v2l_fast.shapes.cli import app as shapes_app
from v2l_fast.training.cli import train_command
from v2l_fast.training.data_cli import (
    cache_command,
    finevideo_app,
    print_outcome,
    teach_command,
)

if TYPE_CHECKING:
    from v2l_fast.corpus import CorpusSettings

app = typer.Typer(
    name="v2l",
    help="Turn videos into LoRA adapters and ask a frozen VLM about them without visual tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(analyze_app, name="analyze")
app.add_typer(evaluation_app)
app.add_typer(shapes_app, name="shapes")
app.add_typer(finevideo_app, name="finevideo")
app.command("train")(train_command)
app.command("teach")(teach_command)
app.command("cache")(cache_command)
app.command()(serve)
app.command()(sweep)

Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Nucleus of the sampled distribution.")]
Seed = Annotated[int, typer.Option(help="Seed of sampling.")]


def _known_decoder(name: str) -> str:
    # Its module loads torch: help must come at once.
    if name != "auto":
        from v2l_fast.video.reading import BACKENDS

        if name not in BACKENDS:
            raise typer.BadParameter(f"use one of {', '.join(BACKENDS)}, not {name}")
    return name


Decoder = Annotated[
    str,
    typer.Option(
        help="What decodes: auto (DALI on a GPU, else PyAV), pyav, torchcodec or dali.",
        callback=_known_decoder,
    ),
]


def main() -> None:
    """Entry point of ``v2l`` and ``python -m v2l_fast``."""
    try:
        app()
    except V2LError as error:
        log.print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(1)
    except ModuleNotFoundError as error:
        from v2l_fast.doctor import remedy

        hint = remedy(error.name or "")
        if hint is None:
            raise
        log.print(f"[bold red]error:[/] {error.name} is not installed: {_escape(hint)}")
        sys.exit(1)
    except KeyboardInterrupt:
        log.print("interrupted")
        sys.exit(130)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Turn videos into LoRA adapters and ask a frozen VLM about them without visual tokens."""
    if version:
        out.print(v2l_fast.__version__)
        raise typer.Exit


@app.command()
def internalize(
    out_path: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Adapter file; a folder for several videos; with --manifest, "
            "an adapter store."
        ),
    ],
    videos: Annotated[list[Path] | None, typer.Argument(help="Video files.")] = None,
    manifest: Annotated[
        Path | None, typer.Option(help="Videos of a JSONL manifest, instead of files.")
    ] = None,
    video_root: Annotated[
        Path | None,
        typer.Option("--root", help="What the manifest's paths start from; its folder if omitted."),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="With --manifest: local, or ray for a Ray cluster.")
    ] = "local",
    workers: Annotated[int, typer.Option(min=1, help="Processes of --engine ray.")] = 1,
    batch_size: Annotated[
        int, typer.Option(min=1, help="With --manifest: videos that go through the model together.")
    ] = 8,
    chunks: Annotated[
        int, typer.Option(min=1, help="Parts of a video, internalized apart and composed.")
    ] = 1,
    model: Model = "shapes",
    base: Base = None,
    max_frames: MaxFrames = None,
    longest_edge: LongestEdge = None,
    exact_frames: ExactFrames = False,
    decoder: Decoder = "auto",
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Turn videos into adapters.

    \b
    v2l internalize clip.mp4 --out clip.safetensors
    v2l internalize a.mp4 b.mp4 --out adapters/ --model path/to/hypernetwork
    v2l internalize lecture.mp4 --out lecture.safetensors --chunks 4
    v2l internalize --manifest corpus.jsonl --out store/
    v2l internalize --manifest corpus.jsonl --out /shared/store --engine ray --workers 8

    With --manifest, repeat the same command to go on after an interruption; videos that cannot be
    read are left out and named. Servers may use the store at the same time.
    """
    if (manifest is None) == (not videos):
        raise typer.BadParameter("name video files, or a manifest with --manifest")
    if manifest is not None and chunks > 1:
        raise typer.BadParameter("--chunks goes with video files, not with --manifest")
    if manifest is not None:
        from v2l_fast.corpus import CorpusSettings

        settings = CorpusSettings(
            model,
            base,
            device,
            dtype,
            max_frames,
            longest_edge,
            exact_frames,
            decoder=decoder,
            batch_size=batch_size,
        )
        _internalize_manifest(manifest, out_path, settings, video_root, engine, workers, as_json)
        return
    several = len(videos) > 1 or out_path.is_dir()
    targets = [out_path / f"{v.stem}.safetensors" if several else out_path for v in videos]
    if len(set(targets)) < len(targets):
        raise ConfigError("two videos have the same name: internalize them into different folders")
    loaded = load_model(model, base, device, dtype)
    targets[0].parent.mkdir(parents=True, exist_ok=True)
    written = []
    for video, target in zip(videos, targets, strict=True):
        with progress_bar(video.name) as report:
            adapter = loaded.internalize(
                video,
                max_frames=max_frames,
                longest_edge=longest_edge,
                exact_frames=exact_frames,
                chunks=chunks,
                decoder=decoder,
                progress=report,
            )
        adapter.save(target)
        parts = adapter.provenance.get("chunks", [adapter.provenance])
        written.append(
            {
                "video": str(video),
                "adapter": str(target),
                "chunks": len(parts),
                "frames": sum(len(part["source"]["frame_indices"]) for part in parts),
                "duration": sum(part["source"]["duration"] for part in parts),
                "bytes": target.stat().st_size,
            }
        )
        if not as_json:
            last = written[-1]
            out.print(
                f"{target}: {last['frames']} frames of {last['duration']:.1f} s, "
                f"{last['bytes'] / 1e6:.2f} MB",
                highlight=False,
            )
    if as_json:
        out.print_json(data=written)


@app.command()
def ask(
    items: Annotated[
        list[str],
        typer.Argument(
            help="Adapter files (.safetensors), then questions.", metavar="ADAPTER... QUESTION..."
        ),
    ],
    plain: Annotated[
        bool, typer.Option("--without", help="Also answer without any adapter, for comparison.")
    ] = False,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    model: Model = "shapes",
    base: Base = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Ask every question about every adapter, all in one batch.

    \b
    v2l ask clip.safetensors "What happens in the video?"
    v2l ask a.safetensors b.safetensors "What color is the ring?" "How many objects are there?"
    """
    files = [item for item in items if item.endswith(".safetensors")]
    questions = [item for item in items if not item.endswith(".safetensors")]
    if not files and not plain:
        raise typer.BadParameter("name at least one adapter file (.safetensors)")
    if not questions:
        raise typer.BadParameter("ask at least one question")
    loaded = load_model(model, base, device, dtype)
    names = [*files, *(["(no adapter)"] if plain else [])]
    adapters = [*(loaded.load_adapter(file) for file in files), *([None] if plain else [])]
    answers = loaded.answer(
        [q for _ in adapters for q in questions],
        [a for a in adapters for _ in questions],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    rows = [
        {"adapter": name, "question": question} for name in names for question in questions
    ]
    if as_json:
        out.print_json(
            data=[row | dataclasses.asdict(a) for row, a in zip(rows, answers, strict=True)]
        )
    elif len(rows) == 1:
        out.print(answers[0].text, highlight=False, markup=False)
    else:
        table = Table("adapter", "question", "answer")
        for row, answer in zip(rows, answers, strict=True):
            table.add_row(row["adapter"], row["question"], answer.text)
        out.print(table)


@app.command()
def chat(
    adapter: Annotated[Path, typer.Argument(help="Adapter file.")],
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    model: Model = "shapes",
    base: Base = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Ask one question after the other; an empty line or Ctrl-D ends.

    Every question is answered from the adapter alone, without the earlier ones.
    """
    loaded = load_model(model, base, device, dtype)
    internalized = loaded.load_adapter(adapter)
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            log.print("[bold]>[/] ", end="")
        question = sys.stdin.readline().strip()
        if not question:
            return
        (answer,) = loaded.answer(
            question,
            internalized,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        out.print(answer.text, highlight=False, markup=False)


@app.command()
def compose(
    adapters: Annotated[list[Path], typer.Argument(help="Adapter files, in the order of time.")],
    out_path: Annotated[Path, typer.Option("--out", "-o", help="Composed adapter file.")],
) -> None:
    """Join adapters of consecutive chunks into one (concatenated in rank, the bias once).

    \b
    v2l compose first.safetensors second.safetensors --out whole.safetensors
    """
    from v2l_fast.adapter import Adapter

    composed = Adapter.compose([Adapter.load(path) for path in adapters])
    out_path.parent.mkdir(parents=True, exist_ok=True)
    composed.save(out_path)
    out.print(f"{out_path}: {len(adapters)} chunks, generated rank {composed.rank}")


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Released checkpoint (.pt).")],
    folder: Annotated[Path, typer.Argument(help="Folder for config.json and model.safetensors.")],
) -> None:
    """Convert a released checkpoint to safetensors without running anything it contains.

    \b
    v2l convert frames2lora-smolvlm2-500m-best-ce.pt hypernet-500m/
    """
    from v2l_fast.interop.frames2lora import convert as run

    network = run(checkpoint, folder)
    count = sum(p.numel() for p in network.parameters())
    out.print(f"{folder}: {count:,} parameters, rank {network.config.rank}", highlight=False)


@app.command()
def export(
    adapter: Annotated[Path | None, typer.Argument(help="Adapter file, for --peft.")] = None,
    peft: Annotated[Path | None, typer.Option(help="Write a PEFT folder here.")] = None,
    llama: Annotated[
        Path | None, typer.Option(help="Write the VLM's text decoder here, as a plain Llama.")
    ] = None,
    vllm: Annotated[
        Path | None,
        typer.Option(help="Write a PEFT folder in this one and print the vLLM command."),
    ] = None,
    served_base: Annotated[
        str | None,
        typer.Option(help="Name or path the base is served under; --base if omitted."),
    ] = None,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="The adapter is for the --llama export.")
    ] = False,
    model: Model = "shapes",
    base: Base = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Export for PEFT, vLLM and other servers.

    \b
    v2l export clip.safetensors --peft clip-peft/
    v2l export clip.safetensors --vllm adapters/ --served-base org/model
    v2l export --llama text-decoder/
    """
    from v2l_fast.interop.llama import export_text_decoder
    from v2l_fast.interop.peft import TEXT_LAYERS, VLM_LAYERS, save_peft

    if peft is None and llama is None and vllm is None:
        raise typer.BadParameter("name --peft FOLDER, --vllm FOLDER or --llama FOLDER to write")
    if (peft is None and vllm is None) != (adapter is None):
        raise typer.BadParameter("--peft and --vllm export an adapter file: name it first")
    loaded = load_model(model, base, device, dtype)
    if llama is not None:
        export_text_decoder(loaded.backbone.model, llama, loaded.backbone.tokenizer)
        out.print(f"{llama}: the text decoder as LlamaForCausalLM", highlight=False)
    name = served_base or base or loaded.backbone.name_or_path
    if vllm is not None:
        from v2l_fast.serving.vllm import VllmFolder

        target, attached = VllmFolder(vllm, name, text_only), loaded.load_adapter(adapter)
        target.write(adapter.stem, attached)
        rank = next(iter(attached.merged()[0].values())).shape[1]
        out.print(f"{vllm / adapter.stem}: PEFT adapter for {name}. Serve and ask for it with:")
        out.print(target.command(rank), soft_wrap=True, highlight=False, markup=False)
        out.print(f'"model": "{adapter.stem}"', highlight=False, markup=False)
    if peft is not None:
        layers = TEXT_LAYERS if text_only else VLM_LAYERS
        save_peft(loaded.load_adapter(adapter), peft, name, layers=layers)
        out.print(f"{peft}: PEFT adapter for {name}", highlight=False)


@app.command()
def demo(
    folder: Annotated[
        Path | None, typer.Option("--keep", help="Keep the clip and the adapter here.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Which scene of the test split.")] = 0,
) -> None:
    """Render a clip, internalize it and ask about it, beside the same model seeing the video."""
    from v2l_fast.demo import run

    run(out, folder, seed)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What is installed, what each missing part would bring, and why."""
    from v2l_fast.doctor import examine

    findings = examine()
    if as_json:
        out.print_json(data=[dataclasses.asdict(finding) for finding in findings])
        return
    table = Table("part", "found", "what it is for")
    for finding in findings:
        mark = "[green]yes[/]" if finding.present else "[yellow]no[/]"
        table.add_row(finding.part, f"{mark} {_escape(finding.found)}", _escape(finding.purpose))
    out.print(table)


# --- shared by the commands ---------------------------------------------------------------------


def _internalize_manifest(
    manifest: Path,
    store: Path,
    settings: CorpusSettings,
    video_root: Path | None,
    engine: str,
    workers: int,
    as_json: bool,
) -> None:
    from v2l_fast.corpus import internalize_corpus

    if engine not in ("local", "ray"):
        raise typer.BadParameter(f"--engine is local or ray, not {engine}")
    if settings.dtype not in (None, "float32", "bfloat16", "float16"):
        raise typer.BadParameter(
            f"--dtype is float32, bfloat16 or float16, not {settings.dtype}"
        )
    quiet_transformers()
    with progress_bar("internalizing") as report:
        made = internalize_corpus(
            manifest, store, settings, video_root, engine, workers, partial(report, "videos")
        )
    print_outcome(
        f"{store}: {made.adapters} adapters, listed in {made.listing}",
        {"store": str(store), "listing": str(made.listing), "adapters": made.adapters},
        made.failures,
        as_json,
    )


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
