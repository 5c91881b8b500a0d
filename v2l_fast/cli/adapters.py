"""``v2l internalize``, ``ask``, ``chat``, ``compose``: videos to adapters, adapters to answers."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer import Argument, Option

from v2l_fast.cli.options import (
    FORCE,
    JSON,
    FrameOptions,
    GenerationOptions,
    ModelOptions,
    check_text,
    one_of,
    options,
    output_file,
    output_path,
    quiet_transformers,
    with_options,
)
from v2l_fast.console import (
    answer_text,
    note,
    out,
    print_outcome,
    printable,
    progress_bar,
    say,
    show_json,
    show_table,
)
from v2l_fast.errors import ConfigError, VideoError, WriteError

if TYPE_CHECKING:
    from v2l_fast.hypernet.adapter import Adapter

# Videos or questions that do not make up for the minutes that compiling takes on a GPU.
FEW = 32


@options("Many videos")
class CorpusOptions:
    """A manifest of videos in place of files."""

    manifest: Path | None = Option(None, help="Internalize the videos of a manifest (JSON lines).")
    video_root: Path | None = Option(
        None, "--root", help="Folder that video paths are relative to. By default, the manifest's."
    )
    engine: str = Option(
        "local", help="local, or ray for a Ray cluster.", callback=one_of("local", "ray")
    )
    workers: int = Option(1, min=1, help="Processes of --engine ray.")
    batch_size: int = Option(8, min=1, help="Videos of one forward pass.")


@with_options
def internalize(
    corpus: CorpusOptions,
    frames: FrameOptions,
    loading: ModelOptions,
    out_path: str = Option(
        ...,
        "--out",
        "-o",
        parser=output_path,
        metavar="PATH",
        help="Adapter file; a folder for several videos, or if it ends in /; "
        "with --manifest, an adapter store.",
    ),
    videos: list[Path] | None = Argument(None, help="Video files."),
    chunks: int = Option(
        1, min=1, help="Parts of each video to internalize separately and compose."
    ),
    decoder: str = Option(
        "auto",
        help="Video decoder: auto (DALI on a GPU, else PyAV), pyav, torchcodec or dali.",
        callback=one_of("auto", "pyav", "torchcodec", "dali"),
    ),
    force: bool = FORCE,
    as_json: bool = JSON,
) -> None:
    """Turn videos into adapters.

    \b
    v2l internalize clip.mp4 --out clip.safetensors
    v2l internalize a.mp4 b.mp4 --out adapters/ --model path/to/hypernetwork
    v2l internalize lecture.mp4 --out lecture.safetensors --chunks 4
    v2l internalize --manifest corpus.jsonl --out store/
    v2l internalize --manifest corpus.jsonl --out /shared/store --engine ray --workers 8

    A video that cannot be read does not stop the others; the exit code is then 1. Existing files
    are replaced with --force only.

    With --manifest, repeat the same command to continue after an interruption; videos that cannot
    be read are listed and left out. Servers may use the store at the same time.

    Videos longer than 6 hours are refused: cut them, or read them in Python with
    load_video(path, limits=Limits(max_duration=SECONDS)) from v2l_fast.video.
    """
    if (corpus.manifest is None) == (not videos):
        raise typer.BadParameter("name video files, or a manifest with --manifest")
    if corpus.manifest is not None:
        if chunks > 1:
            raise typer.BadParameter("--chunks goes with video files, not with --manifest")
        _internalize_manifest(corpus, frames, loading, Path(out_path), decoder, as_json)
        return
    from v2l_fast.outputs import check_output

    folder = Path(out_path)
    several = len(videos) > 1 or out_path.endswith("/") or folder.is_dir()
    targets = [folder / f"{v.stem}.safetensors" if several else folder for v in videos]
    if len(set(targets)) < len(targets):
        raise ConfigError("two videos have the same name: internalize them into different folders")
    for target in targets:
        check_output(target, videos, force)
    model = loading.load(compile=None if len(videos) > FEW else False)
    rows: list[dict[str, Any]] = []
    for video, target in zip(videos, targets, strict=True):
        try:
            with progress_bar(video.name) as report:
                adapter = model.internalize(
                    video, **asdict(frames), chunks=chunks, decoder=decoder, progress=report
                )
        except (VideoError, OSError) as error:
            if len(videos) == 1 or isinstance(error, WriteError):
                raise
            note(str(error), "error:")
            rows.append({"video": str(video), "error": str(error)})
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        adapter.save(target, overwrite=True)
        row = {"video": str(video), "adapter": str(target), **_describe(adapter, target)}
        rows.append(row)
        if not as_json:
            size = row["bytes"] / 1e6
            say(f"{target}: {row['frames']} frames of {row['duration']:.1f} s, {size:.2f} MB")
    if as_json:
        show_json(rows)
    if failed := sum("error" in row for row in rows):
        note(f"{len(rows) - failed} of {len(rows)} videos internalized, {failed} failed")
        raise typer.Exit(1)


@with_options
def ask(
    generation: GenerationOptions,
    loading: ModelOptions,
    items: list[str] = Argument(
        ..., help="Adapter files, of any name, and questions.", metavar="ADAPTER... QUESTION..."
    ),
    plain: bool = Option(False, "--without", help="Also answer without an adapter."),
    as_json: bool = JSON,
) -> None:
    """Ask every question about every adapter, all in one batch.

    \b
    v2l ask clip.safetensors "What happens in the video?"
    v2l ask a.safetensors b.safetensors "What color is the ring?" "How many objects are there?"

    Outside a terminal every answer is one line, with line breaks as \\n; --json has the exact text.
    """
    from v2l_fast.hypernet.adapter_files import is_adapter_file

    # A file is recognized by its content; one that only has an adapter's name is missing or broken.
    files = [item for item in items if item.endswith(".safetensors") or is_adapter_file(item)]
    questions = [check_text(item) for item in items if item not in files]
    if not files and not plain:
        other = next((item for item in items if _is_file(item)), None)
        hint = "" if other is None else f"; {other} is another file: v2l internalize makes adapters"
        raise typer.BadParameter(f"name at least one adapter file{hint}")
    if not questions:
        raise typer.BadParameter("ask at least one question")
    model = loading.load(compile=None if len(items) > FEW else False)
    names = [*files, *(["(no adapter)"] if plain else [])]
    adapters = [*(model.load_adapter(file) for file in files), *([None] if plain else [])]
    answers = model.answer(
        [q for _ in adapters for q in questions],
        [a for a in adapters for _ in questions],
        **asdict(generation),
    )
    rows = [{"adapter": name, "question": question} for name in names for question in questions]
    if as_json:
        show_json([row | asdict(answer) for row, answer in zip(rows, answers, strict=True)])
    elif len(rows) == 1:
        show_answer(answers[0].text)
    else:
        cells = [
            (printable(row["adapter"]), printable(row["question"]), answer_text(answer.text))
            for row, answer in zip(rows, answers, strict=True)
        ]
        show_table(("adapter", "question", "answer"), cells)


@with_options
def compose(
    files: list[Path] = Argument(
        ..., metavar="ADAPTER...", help="Adapter files, in temporal order."
    ),
    out_path: Path = Option(..., "--out", "-o", help="Composed adapter file.", parser=output_file),
    force: bool = FORCE,
) -> None:
    """Join adapters of consecutive chunks into one (concatenated in rank, the bias once).

    \b
    v2l compose first.safetensors second.safetensors --out whole.safetensors
    """
    from v2l_fast.hypernet.adapter import Adapter
    from v2l_fast.outputs import check_output

    check_output(out_path, files, force)
    composed = Adapter.compose([Adapter.load(path) for path in files])
    out_path.parent.mkdir(parents=True, exist_ok=True)
    composed.save(out_path, overwrite=True)
    say(f"{out_path}: {len(files)} chunks, generated rank {composed.rank}")


# --- steps ----------------------------------------------------------------------------------------


def _internalize_manifest(
    corpus: CorpusOptions,
    frames: FrameOptions,
    loading: ModelOptions,
    store: Path,
    decoder: str,
    as_json: bool,
) -> None:
    from v2l_fast.data.internalize import CorpusSettings, internalize_corpus

    settings = CorpusSettings(
        **asdict(loading), **asdict(frames), decoder=decoder, batch_size=corpus.batch_size
    )
    quiet_transformers()
    with progress_bar("internalizing") as report:
        result = internalize_corpus(
            corpus.manifest, store, settings, corpus.video_root, corpus.engine, corpus.workers,
            partial(report, "videos"),
        )  # fmt: skip
    print_outcome(
        f"{store}: {result.adapters} adapters, listed in {result.listing}",
        {"store": str(store), "listing": str(result.listing), "adapters": result.adapters},
        result.failures,
        as_json,
    )


def _describe(adapter: Adapter, path: Path) -> dict[str, Any]:
    """Chunks, frames, duration (seconds) and size (bytes) of an adapter that a file holds."""
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
    """Print a single answer: on one line, unless standard output is a terminal."""
    out.write_line(printable(text, lines=out.interactive))


def _is_file(item: str) -> bool:
    try:
        return Path(item).is_file()
    except (OSError, ValueError):
        return False
