"""``v2l demo`` and ``v2l doctor``: what this installation can do."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich.text import Text
from typer import Option

from v2l_fast.cli.options import FORCE, JSON, SEED
from v2l_fast.console import show_json, show_table


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
    from v2l_fast.demo import FILES, run
    from v2l_fast.outputs import check_folder

    if folder is not None:
        check_folder(folder, FILES, force=force)
    run(folder, seed)


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
