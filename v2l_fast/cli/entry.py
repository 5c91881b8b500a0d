"""Command line: parses, calls, prints. What a command does lives in the library.

Exit codes: 0 done, 1 failed (one line says what and how to go on), 2 wrong usage.

A command never replaces a file or folder that exists already without ``--force``, and never one of
its inputs. Folders of long runs (stores, evaluations, sweeps, training) continue instead.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

import v2l_fast
from v2l_fast.cli.analyze import app as analyze_app
from v2l_fast.cli.analyze import sweep
from v2l_fast.cli.data import (
    cache_command,
    finevideo_app,
    print_outcome,
    teach_command,
)
from v2l_fast.cli.evaluate import app as evaluation_app
from v2l_fast.cli.options import (
    CONTEXT,
    Base,
    Device,
    Dtype,
    ExactFrames,
    Force,
    Json,
    LongestEdge,
    MaxFrames,
    MaxNewTokens,
    Model,
    SamplingSeed,
    Seed,
    check_text,
    load_model,
    output_file,
    output_path,
    quiet_transformers,
)
from v2l_fast.cli.serve import serve
from v2l_fast.cli.shapes import app as shapes_app
from v2l_fast.cli.train import train_command
from v2l_fast.console import (
    NoteHandler,
    answer_text,
    drop_output,
    flush_output,
    log,
    note,
    out,
    prepare_streams,
    printable,
    progress_bar,
    say,
    show_json,
    show_table,
)
from v2l_fast.errors import (
    ConfigError,
    V2LError,
    VideoError,
    WriteError,
    excerpt,
    os_error_reason,
)

if TYPE_CHECKING:
    from v2l_fast.data.internalize import CorpusSettings
    from v2l_fast.hypernet.adapter import Adapter

app = typer.Typer(
    name="v2l",
    help="Turn videos into LoRA adapters and ask a frozen VLM about them without visual tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT,
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

# The class of every usage error of typer.
UsageError = typer.BadParameter.__base__

Temperature = Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")]
TopP = Annotated[
    float, typer.Option(help="Probability mass that sampling keeps (nucleus sampling).")
]


def _known_decoder(name: str) -> str:
    # Its module loads torch: help must come at once.
    if name != "auto":
        from v2l_fast.video.reading import BACKENDS

        if name not in BACKENDS:
            raise typer.BadParameter(f"must be one of {', '.join(BACKENDS)}, got {name}")
    return name


Decoder = Annotated[
    str,
    typer.Option(
        help="Video decoder: auto (DALI on a GPU, else PyAV), pyav, torchcodec or dali.",
        callback=_known_decoder,
    ),
]


def main() -> None:
    """Entry point of ``v2l`` and ``python -m v2l_fast``."""
    prepare_streams()
    # Names in warnings are data, too.
    logging.lastResort = NoteHandler(logging.WARNING)
    code = 1
    try:
        code = app(standalone_mode=False) or 0
        flush_output()
    except UsageError as error:
        code = _usage_error(error)
    except BrokenPipeError:
        # The reader has what it wanted, as `head` does.
        drop_output()
    except V2LError as error:
        note(str(error), "error:")
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        note(f"{where}{os_error_reason(error)}", "error:")
    except ModuleNotFoundError as error:
        from v2l_fast.doctor import remedy

        hint = remedy(error.name or "")
        if hint is None:
            raise
        note(f"{error.name} is not installed: {hint}", "error:")
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:
        note("interrupted")
    try:
        flush_output()
    except (V2LError, OSError):
        drop_output()
    sys.exit(code)


def _usage_error(error: Exception) -> int:
    """Say what is wrong with the command line; the exit code."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        # Its message is the help, which has been printed.
        return error.exit_code
    if context is not None:
        for line in context.get_usage().splitlines():
            note(line)
        note(f"Try '{context.command_path} --help' for help.")
    message = error.format_message()
    # A value of the wrong type or size is refused by pydantic, whose message does not repeat it.
    if (refusal := getattr(error.__cause__, "errors", None)) is not None:
        message += f", got {excerpt(refusal()[0]['input'])}"
    note(message, "error:")
    return error.exit_code


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Turn videos into LoRA adapters and ask a frozen VLM about them without visual tokens."""
    if version:
        say(v2l_fast.__version__)
        raise typer.Exit


@app.command()
def internalize(
    out_path: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            parser=output_path,
            metavar="PATH",
            help="Adapter file; a folder for several videos, or if it ends in /; "
            "with --manifest, an adapter store.",
        ),  # fmt: skip
    ],
    videos: Annotated[list[Path] | None, typer.Argument(help="Video files.")] = None,
    manifest: Annotated[
        Path | None, typer.Option(help="Videos of a JSONL manifest, instead of files.")
    ] = None,
    video_root: Annotated[
        Path | None,
        typer.Option(
            "--root", help="Folder that the manifest's paths are relative to; its own if omitted."
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="With --manifest: local, or ray for a Ray cluster.")
    ] = "local",
    workers: Annotated[int, typer.Option(min=1, help="Processes of --engine ray.")] = 1,
    batch_size: Annotated[
        int, typer.Option(min=1, help="With --manifest: videos that go through the model together.")
    ] = 8,
    chunks: Annotated[
        int, typer.Option(min=1, help="Number of parts that are internalized apart and composed.")
    ] = 1,
    force: Force = False,
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

    A video that cannot be read does not stop the others; the exit code is then 1. Files that exist
    already are replaced with --force only.

    With --manifest, repeat the same command to continue after an interruption; videos that cannot
    be read are left out and named. Servers may use the store at the same time.

    A video of more than 6 hours is refused: cut it, or read it in Python with
    load_video(path, limits=Limits(max_duration=SECONDS)) of v2l_fast.video.
    """
    if (manifest is None) == (not videos):
        raise typer.BadParameter("name video files, or a manifest with --manifest")
    if manifest is not None and chunks > 1:
        raise typer.BadParameter("--chunks goes with video files, not with --manifest")
    if manifest is not None:
        from v2l_fast.data.internalize import CorpusSettings

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
        _internalize_manifest(
            manifest, Path(out_path), settings, video_root, engine, workers, as_json
        )
        return
    from v2l_fast.outputs import check_output

    folder = Path(out_path)
    several = len(videos) > 1 or out_path.endswith("/") or folder.is_dir()
    targets = [folder / f"{v.stem}.safetensors" if several else folder for v in videos]
    if len(set(targets)) < len(targets):
        raise ConfigError("two videos have the same name: internalize them into different folders")
    for target in targets:
        check_output(target, videos, force)
    loaded = load_model(model, base, device, dtype)
    rows: list[dict] = []
    for video, target in zip(videos, targets, strict=True):
        try:
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
        except (VideoError, OSError) as error:
            if len(videos) == 1 or isinstance(error, WriteError):
                raise
            reason = str(error)
            note(reason, "error:")
            rows.append({"video": str(video), "error": reason})
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        adapter.save(target, overwrite=True)
        rows.append({"video": str(video), "adapter": str(target), **_described(adapter, target)})
        if not as_json:
            say(
                f"{target}: {rows[-1]['frames']} frames of {rows[-1]['duration']:.1f} s, "
                f"{rows[-1]['bytes'] / 1e6:.2f} MB"
            )
    if as_json:
        show_json(rows)
    failed = sum("error" in row for row in rows)
    if failed:
        note(f"{len(rows) - failed} of {len(rows)} videos internalized, {failed} failed")
        raise typer.Exit(1)


@app.command()
def ask(
    items: Annotated[
        list[str],
        typer.Argument(
            help="Adapter files, of any name, and questions.", metavar="ADAPTER... QUESTION..."
        ),
    ],
    plain: Annotated[
        bool, typer.Option("--without", help="Also answer without any adapter, for comparison.")
    ] = False,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: SamplingSeed = 0,
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

    Outside a terminal every answer is one line, with line breaks as \\n; --json has the exact text.
    """
    from v2l_fast.hypernet.adapter_files import is_adapter_file

    # A file is recognized by its content; what only has an adapter's name is missing or broken.
    files = [item for item in items if item.endswith(".safetensors") or is_adapter_file(item)]
    questions = [check_text(item) for item in items if item not in files]
    if not files and not plain:
        named = next((item for item in items if _is_file(item)), None)
        hint = "" if named is None else f"; {named} is another file: v2l internalize makes adapters"
        raise typer.BadParameter(f"name at least one adapter file{hint}")
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
    rows = [{"adapter": name, "question": question} for name in names for question in questions]
    if as_json:
        show_json([row | dataclasses.asdict(a) for row, a in zip(rows, answers, strict=True)])
    elif len(rows) == 1:
        show_answer(answers[0].text)
    else:
        cells = [
            (printable(row["adapter"]), printable(row["question"]), answer_text(answer.text))
            for row, answer in zip(rows, answers, strict=True)
        ]
        show_table(("adapter", "question", "answer"), cells)


@app.command()
def chat(
    adapter: Annotated[Path, typer.Argument(help="Adapter file.")],
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: SamplingSeed = 0,
    model: Model = "shapes",
    base: Base = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Ask one question after the other; an empty line or Ctrl-D ends.

    Every question is answered from the adapter alone, without the earlier ones. Outside a terminal
    every answer is one line.
    """
    loaded = load_model(model, base, device, dtype)
    internalized = loaded.load_adapter(adapter)
    for question in _questions():
        try:
            (answer,) = loaded.answer(
                check_text(question),
                internalized,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
            )
        except V2LError as error:
            # A person can ask again; a script's next answers would stand at the wrong question.
            if not sys.stdin.isatty():
                raise
            note(str(error), "error:")
        else:
            show_answer(answer.text)


@app.command()
def compose(
    adapters: Annotated[list[Path], typer.Argument(help="Adapter files, in the order of time.")],
    out_path: Annotated[
        Path, typer.Option("--out", "-o", help="Composed adapter file.", parser=output_file)
    ],
    force: Force = False,
) -> None:
    """Join adapters of consecutive chunks into one (concatenated in rank, the bias once).

    \b
    v2l compose first.safetensors second.safetensors --out whole.safetensors
    """
    from v2l_fast.hypernet.adapter import Adapter
    from v2l_fast.outputs import check_output

    check_output(out_path, adapters, force)
    composed = Adapter.compose([Adapter.load(path) for path in adapters])
    out_path.parent.mkdir(parents=True, exist_ok=True)
    composed.save(out_path, overwrite=True)
    say(f"{out_path}: {len(adapters)} chunks, generated rank {composed.rank}")


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Released checkpoint (.pt).")],
    folder: Annotated[Path, typer.Argument(help="Folder for config.json and model.safetensors.")],
    force: Force = False,
) -> None:
    """Convert a released checkpoint to safetensors without running anything it contains.

    \b
    v2l convert frames2lora-smolvlm2-500m-best-ce.pt hypernet-500m/
    """
    from v2l_fast.interop.frames2lora import convert as run
    from v2l_fast.outputs import check_new_folder

    check_new_folder(folder, [checkpoint], force)
    network = run(checkpoint, folder)
    count = sum(p.numel() for p in network.parameters())
    say(f"{folder}: {count:,} parameters, rank {network.config.rank}")


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
    force: Force = False,
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
    from v2l_fast.outputs import check_new_folder

    if peft is None and llama is None and vllm is None:
        raise typer.BadParameter("name --peft FOLDER, --vllm FOLDER or --llama FOLDER to write")
    if (peft is None and vllm is None) != (adapter is None):
        raise typer.BadParameter("--peft and --vllm export an adapter file: name it first")
    inputs = [path for path in (adapter, model, base) if path is not None]
    exported = None if vllm is None else vllm / adapter.stem
    for folder in (peft, llama, exported):
        if folder is not None:
            check_new_folder(folder, inputs, force)
    loaded = load_model(model, base, device, dtype)
    if llama is not None:
        export_text_decoder(loaded.backbone.model, llama, loaded.backbone.tokenizer)
        say(f"{llama}: the text decoder as LlamaForCausalLM")
    name = served_base or base or loaded.backbone.name_or_path
    if vllm is not None:
        from v2l_fast.interop.vllm import VllmFolder

        target, attached = VllmFolder(vllm, name, text_only), loaded.load_adapter(adapter)
        target.write(adapter.stem, attached)
        rank = next(iter(attached.merged()[0].values())).shape[1]
        say(f"{exported}: PEFT adapter for {name}. Serve and ask for it with:")
        say(target.command(rank))
        say(f'"model": "{adapter.stem}"')
    if peft is not None:
        layers = TEXT_LAYERS if text_only else VLM_LAYERS
        save_peft(loaded.load_adapter(adapter), peft, name, layers=layers)
        say(f"{peft}: PEFT adapter for {name}")


@app.command()
def demo(
    folder: Annotated[
        Path | None, typer.Option("--keep", help="Keep the clip and the adapter here.")
    ] = None,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Render a clip, internalize it and ask about it, beside the same model seeing the video.

    \b
    v2l demo
    v2l demo --keep demo/
    """
    from v2l_fast.demo import FILES, run
    from v2l_fast.outputs import check_folder

    if folder is not None:
        check_folder(folder, FILES, force=force)
    run(folder, seed)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What is installed, what each missing part would bring, and why."""
    from v2l_fast.doctor import examine

    findings = examine()
    if as_json:
        show_json([dataclasses.asdict(finding) for finding in findings])
        return
    rows = []
    for finding in findings:
        mark = Text("yes " if finding.present else "no ", "green" if finding.present else "yellow")
        rows.append((finding.part, mark.append(finding.found, "default"), finding.purpose))
    show_table(("part", "installed", "what it is for"), rows)


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
    from v2l_fast.data.internalize import internalize_corpus

    if engine not in ("local", "ray"):
        raise typer.BadParameter(f"--engine must be local or ray, got {engine}")
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


def _described(adapter: Adapter, path: Path) -> dict[str, Any]:
    """Chunks, frames, duration (seconds) and size of an adapter that was written to a file."""
    parts = adapter.provenance.get("chunks", [adapter.provenance])
    return {
        "chunks": len(parts),
        "frames": sum(len(part["source"]["frame_indices"]) for part in parts),
        "duration": sum(part["source"]["duration"] for part in parts),
        # A device keeps nothing.
        "bytes": path.stat().st_size
        or sum(t.nbytes for factors in (adapter.A, adapter.B) for t in factors.values()),
    }


def show_answer(text: str) -> None:
    """A single answer on standard output: one line, unless a terminal shows it."""
    out.write_line(printable(text, lines=out.interactive))


def _is_file(item: str) -> bool:
    try:
        return Path(item).is_file()
    except (OSError, ValueError):
        return False


def _questions() -> Iterator[str]:
    """Lines of standard input up to the first empty one.

    Raises:
        ConfigError: a line is not UTF-8.
    """
    if sys.stdin.isatty() and sys.stdout.isatty():
        # Importing it gives `input` line editing and a history.
        with suppress(ImportError):
            import readline  # noqa: F401
        while True:
            try:
                question = input("> ").strip()
            except EOFError:
                return
            if not question:
                return
            yield question
    for number in count(1):
        if sys.stdin.isatty():
            log.print("> ", end="")
        try:
            question = sys.stdin.buffer.readline().decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise ConfigError(f"standard input: line {number} is not UTF-8 text") from None
        if not question:
            return
        yield question
