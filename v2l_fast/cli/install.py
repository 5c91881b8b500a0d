"""``v2l demo`` and ``v2l doctor``: what this installation can do."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import random
import tempfile
from dataclasses import asdict, dataclass
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
    """Render a clip, internalize it and ask about it; compare with the video in context.

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
        seed: seed of the scene, which is from the test split.
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
    findings = examine()
    if as_json:
        show_json([asdict(finding) for finding in findings])
        return
    rows = []
    for finding in findings:
        mark = Text("yes " if finding.present else "no ", "green" if finding.present else "yellow")
        rows.append((finding.part, mark.append(finding.detail, "default"), finding.purpose))
    show_table(("part", "installed", "purpose"), rows)


# --- parts of the installation --------------------------------------------------------------------

# (distribution names, extra that installs it, purpose). The import name does not identify a
# distribution: flash-attn 2 and 4 share theirs, and nvidia-dali is a placeholder package.
PARTS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("torch",), "core", "tensors, autograd, compilation"),
    (("triton",), "core", "GPU kernels"),
    (("transformers",), "core", "the frozen VLM"),
    (("safetensors",), "core", "weights and adapters on disk"),
    (("av",), "core", "video decoding on the CPU, all codecs"),
    (("rich",), "core", "progress and tables"),
    (("typer",), "core", "the command line"),
    (("nvidia-dali-cuda130", "nvidia-dali-cuda120"), "dali", "video decoding on the GPU"),
    (("flash-attn",), "flash", "FlashAttention 2; PyTorch's own attention is used without it"),
    (("torchcodec",), "codec", "an alternative video decoder"),
    (("accelerate",), "train", "training on several GPUs"),
    (("pydantic",), "train", "settings of training runs"),
    (("tensorboard",), "train", "training curves"),
    (("fastapi",), "serve", "the HTTP server"),
    (("uvicorn",), "serve", "its HTTP listener"),
    (("prometheus-client",), "serve", "its metrics"),
    (("python-multipart",), "serve", "its uploads"),
    (("fastapi-offline",), "serve", "its API documentation without a network"),
    (("scipy",), "eval", "confidence intervals"),
    (("matplotlib",), "eval", "plots"),
    (("openai",), "eval", "the judge's client"),
    (("ray",), "ray", "teacher generation and internalizing on a cluster"),
    (("peft",), "dev", "tests of the PEFT export"),
)


# From this version on, ptxas assembles pipelined wgmma products correctly (triton#9433).
PTXAS = (13, 3)


@dataclass(frozen=True)
class Finding:
    """One part of the installation.

    Attributes:
        detail: its versions, or how to install it.
    """

    part: str
    present: bool
    detail: str
    purpose: str


def remedy(module: str) -> str | None:
    """How to install a part, from its import name; None if it is not one of ours."""
    for names, extra, _ in PARTS:
        if module.split(".")[0] in (name.replace("-", "_") for name in names):
            return _install(extra)
    return None


def examine() -> list[Finding]:
    """Examine this machine without changing anything."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"Python {platform.python_version()}, {os.cpu_count()} cores, {memory:.0f} GB"
    findings = [Finding("machine", True, machine, "runs everything"), _gpu(), *_ptxas()]
    for names, extra, purpose in PARTS:
        versions = {name: version for name in names if (version := _version(name))}
        if versions:
            detail = ", ".join(f"{name} {version}" for name, version in versions.items())
            findings.append(Finding(names[0], True, detail, purpose))
        else:
            findings.append(Finding(names[0], False, _install(extra), purpose))
    return findings


def _install(extra: str) -> str:
    return "reinstall v2l_fast" if extra == "core" else f"pip install 'v2l_fast[{extra}]'"


def _gpu() -> Finding:
    import torch

    purpose = "bfloat16, Triton kernels, decoding on the GPU"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        major, minor = torch.cuda.get_device_capability()
        return Finding("GPU", True, f"{name}, compute capability {major}.{minor}", purpose)
    if torch.version.cuda is None:
        return Finding("GPU", False, "this torch is a CPU build", purpose)
    return Finding("GPU", False, "torch finds no GPU; check the driver with nvidia-smi", purpose)


def _ptxas() -> list[Finding]:
    """The assembler of the Triton kernels; an old one is a finding on Hopper GPUs."""
    import torch

    try:
        from triton import knobs

        tool = knobs.nvidia.ptxas
        version, path = tool.version, tool.path
    except Exception:
        # Without triton, or without an assembler, which the kernels' own errors report.
        return []
    detail = f"{version}, {path}"
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    sound = not hopper or tuple(map(int, version.split(".")[:2])) >= PTXAS
    if not sound:
        detail += (
            "; before 13.3 it may miscompile pipelined products on this GPU (triton#9433): install "
            "CUDA 13.3 or later and set TRITON_PTXAS_PATH to its bin/ptxas"
        )
    return [Finding("ptxas", sound, detail, "assembles the Triton kernels")]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
