"""FineVideo spans as a manifest: prompts, splits, and files cut from the videos if asked for.

The metadata defines spans alone; answers are the teacher's (`v2l teach`). A span is a line of the
manifest, and the video stays as it is unless spans are to be files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v2l_fast.data.finevideo import MIX, Pools, Span, mix_spans, read_pools
from v2l_fast.data.manifest import video_share, write_manifest
from v2l_fast.data.shards import Progress
from v2l_fast.errors import VideoError
from v2l_fast.video.cut import cut_span

# As many of each kind as the released recipe has, in other words.
PROMPTS = {
    "scene": ("Describe what happens in this scene.", "Sum up this scene in a few sentences."),
    "adjacent": (
        "Describe what happens in this part of the video, in order.",
        "Sum up this part of the video.",
    ),
    "full": ("Sum up this video in one to three sentences.",),
}


@dataclass(frozen=True)
class Built:
    """The rows written, the pools they came from, and what was left out of either, with why."""

    rows: list[dict[str, Any]]
    pools: Pools
    left_out: Mapping[str, str]


def build_manifest(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    total: int | None = None,
    mix: Mapping[str, float] = MIX,
    val_share: float = 0.01,
    questions: int = 0,
    seed: int = 0,
    cut: bool = False,
    progress: Progress = lambda done, total: None,
) -> Built:
    """Write a manifest of spans without targets.

    Args:
        val_share: of the videos; their spans are the split "val".
        questions: of the metadata, at most so many for each whole video, as further prompts.
        cut: also write every span as a file under ``clips/`` beside the manifest, for which the
            lines then stand; a span that cannot be cut is left out.
    """
    pools = read_pools(folder)
    home = Path(out).resolve().parent
    home.mkdir(parents=True, exist_ok=True)
    base = os.path.relpath(Path(folder), home)
    rows: list[dict[str, Any]] = []
    left_out = dict(pools.left_out)
    spans = mix_spans(pools, total, mix, seed)
    for number, span in enumerate(spans):
        progress(number, len(spans))
        split = "val" if video_share(span.video, seed) < val_share else "train"
        made = list(_rows(span, base, split, questions))
        if cut and span.start is not None:
            try:
                made = [_cut(row, home) for row in made]
            except VideoError as error:
                left_out[span.id] = str(error)
                continue
        rows += made
    progress(len(spans), len(spans))
    write_manifest(out, rows)
    return Built(rows, pools, left_out)


def _cut(row: dict[str, Any], home: Path) -> dict[str, Any]:
    """The row about a file that holds its span alone."""
    start, end = row["metadata"]["span"]
    clip = Path("clips") / f"{row['id']}.mp4"
    (home / clip).parent.mkdir(parents=True, exist_ok=True)
    if not (home / clip).exists():
        cut_span(home / row["video_path"], (start, end), home / clip)
    kept = {k: v for k, v in row["metadata"].items() if k != "span"}
    told = {"video_path": str(clip), "clip_start_sec": start, "clip_end_sec": end}
    return row | told | {"metadata": kept}


def _rows(span: Span, base: str, split: str, questions: int) -> Iterator[dict[str, Any]]:
    prompts = PROMPTS[span.pool]
    chosen = prompts[hashlib.sha256(span.id.encode()).digest()[0] % len(prompts)]
    metadata: dict[str, Any] = {"pool": span.pool, "video_id": span.video}
    if span.start is not None:
        metadata |= {"span": [span.start, span.end], "scenes": list(span.scenes)}
    asked = [("caption", "", chosen)]
    asked += [("qa", f"-q{n}", text) for n, text in enumerate(span.questions[:questions])]
    for task, suffix, prompt in asked:
        yield {
            "id": span.id + suffix,
            "video_path": os.path.join(base, span.video),
            "task_type": task,
            "prompt": prompt,
            "target_text": "",
            "dataset": "finevideo",
            "split": split,
            "metadata": metadata,
        }
