"""``v2l demo`` and ``v2l doctor``: what this installation can do."""

from __future__ import annotations

import random
import tempfile
from dataclasses import asdict
from pathlib import Path

from rich.text import Text
from typer import Option

from v2l_fast.cli.options import FORCE, JSON, SEED
from v2l_fast.console import progress_bar, say, show_json, show_table

# Files that the demo writes.
DEMO_FILES = ("clip.mp4", "clip.safetensors")


def demo(
    folder: Path | None = Option(None, "--keep", help="Keep the clip and the adapter here."),
    seed: int = SEED,
    force: bool = FORCE,
) -> None:
    """Render a clip, internalize it and ask about it, beside the same model seeing the video.

    \b
    v2l demo
    v2l demo --keep demo/
    """
    from v2l_fast.outputs import check_folder

    if folder is not None:
        check_folder(folder, DEMO_FILES, force=force)
    _run_demo(folder, seed)


def _run_demo(folder: Path | None, seed: int) -> None:
    """Render a clip of an unseen scene, internalize it, ask, print a table.

    Args:
        folder: folder of the clip and the adapter; None keeps neither.
        seed: seed of the scene, which is of the test split.
    """
    import transformers

    from v2l_fast.model import Video2LoRA
    from v2l_fast.shapes.language import ask as question_about
    from v2l_fast.shapes.language import question_kinds
    from v2l_fast.shapes.render import write_clip
    from v2l_fast.shapes.world import sample_scenes

    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return _run_demo(Path(temporary), seed)
    folder.mkdir(parents=True, exist_ok=True)
    transformers.logging.disable_progress_bar()
    rng = random.Random(seed)
    # A video of two objects shows more.
    scene = next(s for s in sample_scenes("test", 64, seed) if len(s.objects) == 2)
    turns = [question_about(scene, kind, rng) for kind in ("caption", *question_kinds(scene))]
    questions = [turn.question for turn in turns]

    with progress_bar("demo") as report:

        def step(number: int, text: str) -> None:
            report(text, number, 6)

        step(0, "load the shipped model")
        model = Video2LoRA.from_pretrained("shapes-any", device="cpu")
        step(1, "render a clip to H.264")
        path = write_clip(scene, folder / DEMO_FILES[0])
        step(2, "decode it")
        clip = model.load_clip(path)
        step(3, "internalize it: one forward pass of encoder and hypernetwork")
        adapter = model.internalize(clip)
        adapter.save(folder / DEMO_FILES[1], overwrite=True)
        step(4, "ask with the adapter, no visual tokens")
        # One at a time: a batch would hide the time to first token.
        internalized = [model.answer(question, adapter)[0] for question in questions]
        step(5, "ask with the video in context")
        direct = [model.answer_direct(question, clip)[0] for question in questions]
        step(6, "done")

    columns = (
        "question",
        f"adapter,\n{internalized[0].visual_tokens} visual tokens",
        f"video in context,\n{direct[0].visual_tokens} visual tokens",
        "reference",
        "first token, ms:\nadapter / video",
    )
    rows = []
    for turn, adapted, in_context in zip(turns, internalized, direct, strict=True):
        times = " / ".join(f"{1e3 * a.time_to_first_token:.0f}" for a in (adapted, in_context))
        rows.append((turn.question, adapted.text, in_context.text, turn.answer, times))
    title = f"A video the model never saw: {clip.duration:.0f} s, {len(clip.frames)} frames"
    show_table(columns, rows, title)
    size = (folder / DEMO_FILES[1]).stat().st_size
    say(
        f"The adapter is {size / 1e3:.0f} kB. The shipped model is tiny: it shows that the method "
        "works, not how much time a large model saves."
    )


def doctor(as_json: bool = JSON) -> None:
    """Show what is installed, what each missing part would add, and how to install it.

    \b
    v2l doctor
    """
    from v2l_fast.doctor import examine

    findings = examine()
    if as_json:
        show_json([asdict(finding) for finding in findings])
        return
    rows = []
    for finding in findings:
        mark = Text("yes " if finding.present else "no ", "green" if finding.present else "yellow")
        rows.append((finding.part, mark.append(finding.detail, "default"), finding.purpose))
    show_table(("part", "installed", "purpose"), rows)
