"""The demo: a real video file to answers, with and without visual tokens, on any machine."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import transformers
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from v2l_fast.model import Video2LoRA
from v2l_fast.shapes.language import ask as question_of_kind
from v2l_fast.shapes.language import question_kinds
from v2l_fast.shapes.render import write_clip
from v2l_fast.shapes.scene import sample_scenes


def run(console: Console, folder: Path | None, seed: int) -> None:
    """Render a clip of an unseen scene, internalize it, ask, print a table.

    Args:
        console: where progress and table go.
        folder: where clip and adapter are kept; nowhere when None.
        seed: which scene of the test split.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return run(console, Path(temporary), seed)
    folder.mkdir(parents=True, exist_ok=True)
    transformers.logging.disable_progress_bar()
    rng = random.Random(seed)
    # Two objects make the more telling video.
    scene = next(s for s in sample_scenes("test", 64, seed) if len(s.objects) == 2)
    turns = [question_of_kind(scene, kind, rng) for kind in ("caption", *question_kinds(scene))]
    questions = [turn.question for turn in turns]

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:

        def step(text: str):
            for task in bar.tasks:
                bar.update(task.id, total=1, completed=1)
            bar.add_task(text, total=None)

        step("load the shipped model")
        model = Video2LoRA.from_pretrained("shapes", device="cpu")
        step("render a clip to H.264")
        path = write_clip(scene, folder / "clip.mp4")
        step("decode it")
        clip = model.load_clip(path)
        step("internalize it: one forward pass of encoder and hypernetwork")
        adapter = model.internalize(clip)
        adapter.save(folder / "clip.safetensors")
        step("ask with the adapter, no visual tokens")
        # One at a time, as a person asks: a batch would hide the time to first token.
        internalized = [model.answer(question, adapter)[0] for question in questions]
        step("ask with the video in context")
        direct = [model.answer_direct(question, clip)[0] for question in questions]
        step("done")
        for task in bar.tasks:
            bar.update(task.id, total=1, completed=1)

    table = Table(
        "question",
        f"adapter,\n{internalized[0].visual_tokens} visual tokens",
        f"video in context,\n{direct[0].visual_tokens} visual tokens",
        "reference",
        "first token, ms:\nadapter / video",
        title=f"A video the model never saw: {clip.duration:.0f} s, {len(clip.frames)} frames",
    )
    for turn, short, long in zip(turns, internalized, direct, strict=True):
        first, second = (1e3 * a.time_to_first_token for a in (short, long))
        times = f"{first:.0f} / {second:.0f}"
        table.add_row(turn.question, short.text, long.text, turn.answer, times)
    console.print(table)
    size = (folder / "clip.safetensors").stat().st_size
    console.print(
        f"The adapter is {size / 1e3:.0f} kB. The shipped model is tiny: it shows that it works, "
        "not how fast a large one gets.",
        highlight=False,
    )
