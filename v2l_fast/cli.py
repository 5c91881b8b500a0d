"""Command line: parses, calls, prints. What a command does lives in the library.

Exit codes: 0 done, 1 failed (one line says what and how to go on), 2 wrong usage.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import v2l_fast
from v2l_fast.errors import ConfigError, V2LError
from v2l_fast.shapes.cli import app as shapes_app

app = typer.Typer(
    name="v2l",
    help="Turn videos into LoRA adapters and ask a frozen VLM about them without visual tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
analyze_app = typer.Typer(help="Look into adapters.", no_args_is_help=True)
app.add_typer(analyze_app, name="analyze")
app.add_typer(shapes_app, name="shapes")

out = Console()
log = Console(stderr=True)

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
Device = Annotated[str | None, typer.Option(help="cuda or cpu; a GPU is used when there is one.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; by device if omitted.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
MaxFrames = Annotated[int | None, typer.Option(help="Frames to sample; as in training if omitted.")]
LongestEdge = Annotated[
    int | None, typer.Option(help="Longest frame edge in pixels; as in training if omitted.")
]
ExactFrames = Annotated[
    bool, typer.Option("--exact-frames", help="Take exactly --max-frames, whatever the duration.")
]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Nucleus of the sampled distribution.")]
Seed = Annotated[int, typer.Option(help="Seed of sampling.")]


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
    videos: Annotated[list[Path], typer.Argument(help="Video files.")],
    out_path: Annotated[
        Path,
        typer.Option("--out", "-o", help="Adapter file; a folder for several videos."),
    ],
    model: Model = "shapes",
    base: Base = None,
    max_frames: MaxFrames = None,
    longest_edge: LongestEdge = None,
    exact_frames: ExactFrames = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Turn videos into adapters.

    \b
    v2l internalize clip.mp4 --out clip.safetensors
    v2l internalize a.mp4 b.mp4 --out adapters/ --model path/to/hypernetwork
    """
    several = len(videos) > 1 or out_path.is_dir()
    targets = [out_path / f"{v.stem}.safetensors" if several else out_path for v in videos]
    if len(set(targets)) < len(targets):
        raise ConfigError("two videos have the same name: internalize them into different folders")
    loaded = _load(model, base, device, dtype)
    targets[0].parent.mkdir(parents=True, exist_ok=True)
    written = []
    for video, target in zip(videos, targets, strict=True):
        with _progress(video.name) as report:
            adapter = loaded.internalize(
                video,
                max_frames=max_frames,
                longest_edge=longest_edge,
                exact_frames=exact_frames,
                progress=report,
            )
        adapter.save(target)
        source = adapter.provenance["source"]
        written.append(
            {
                "video": str(video),
                "adapter": str(target),
                "frames": len(source["frame_indices"]),
                "duration": source["duration"],
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
    loaded = _load(model, base, device, dtype)
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
    loaded = _load(model, base, device, dtype)
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
    v2l export --llama text-decoder/
    """
    from v2l_fast.interop.llama import export_text_decoder
    from v2l_fast.interop.peft import TEXT_LAYERS, VLM_LAYERS, save_peft

    if peft is None and llama is None:
        raise typer.BadParameter("say what to write: --peft FOLDER or --llama FOLDER")
    if (peft is None) != (adapter is None):
        raise typer.BadParameter("--peft exports an adapter file: name it first")
    loaded = _load(model, base, device, dtype)
    if llama is not None:
        export_text_decoder(loaded.backbone.model, llama, loaded.backbone.tokenizer)
        out.print(f"{llama}: the text decoder as LlamaForCausalLM", highlight=False)
    if peft is not None:
        name = served_base or base or loaded.backbone.name_or_path
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


@analyze_app.command()
def effect(
    adapter: Annotated[Path, typer.Argument(help="Adapter file.")],
    question: Annotated[str, typer.Argument(help="A question to answer with and without it.")],
    model: Model = "shapes",
    base: Base = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Did the adapter do anything? Update norms, logit shift, both answers.

    \b
    v2l analyze effect clip.safetensors "What happens in the video?"
    """
    loaded = _load(model, base, device, dtype)
    found = loaded.effect(loaded.load_adapter(adapter), question)
    if as_json:
        out.print_json(data=dataclasses.asdict(found))
        return
    table = Table("module", "layer", "update norm", "relative to the weight")
    for module, norms in found.update_norms.items():
        for layer, (norm, relative) in enumerate(
            zip(norms, found.relative_norms[module], strict=True)
        ):
            table.add_row(module, str(layer), f"{norm:.4g}", f"{relative:.2%}")
    out.print(table)
    out.print(f"first answer token: largest logit change {found.logit_shift:.3g}, "
              f"divergence {found.divergence:.3g} nats", highlight=False)
    out.print(f"with the adapter:    {found.answer}", highlight=False, markup=False)
    out.print(f"without the adapter: {found.answer_without}", highlight=False, markup=False)


# --- shared by the commands ---------------------------------------------------------------------


def _load(model: str, base: str | None, device: str | None, dtype: str | None):
    with log.status(f"loading {model}"):
        import torch
        import transformers

        from v2l_fast.model import Video2LoRA

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if dtype is not None and dtype not in dtypes:
            raise typer.BadParameter(f"--dtype is one of {', '.join(dtypes)}, not {dtype}")
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"--device {device}: this machine has no usable GPU; see v2l doctor")
        return Video2LoRA.from_pretrained(
            model, base=base, device=device, dtype=None if dtype is None else dtypes[dtype]
        )


@contextmanager
def _progress(name: str) -> Iterator:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=log, transient=True) as bar:
        task = bar.add_task(name)

        def report(stage: str, done: int, total: int) -> None:
            bar.update(task, description=f"{name}: {stage}", completed=done, total=total)

        yield report


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
