"""A folder of real clips, some of which are broken, with its manifest; quick to make."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

from tests.video.clips import write_silence
from v2l_fast.shapes.language import caption
from v2l_fast.shapes.render import write_clip
from v2l_fast.shapes.world import sample_scenes

# What a file can be instead of a video, and what its failure must say.
REASONS = {
    "truncated": "moov",
    "text": "not a video",
    "empty": "0 bytes",
    "audio": "it holds audio, no video stream",
}


@functools.cache
def clip_bytes(index: int) -> tuple[bytes, str]:
    """An encoded clip of the shapes world, two seconds long, and its caption."""
    import tempfile

    scene = sample_scenes("train", index + 1, 0)[index]
    with tempfile.TemporaryDirectory() as folder:
        path = write_clip(scene, Path(folder) / "clip.mp4", size=64, seconds=2)
        return path.read_bytes(), caption(scene)


def write_broken(path: Path, kind: str) -> None:
    """A file that looks like a video by its name only."""
    if kind == "truncated":
        path.write_bytes(clip_bytes(0)[0][:2000])
    elif kind == "text":
        path.write_text("this is a letter, not a video\n" * 50)
    elif kind == "empty":
        path.touch()
    else:
        write_silence(path)


def write_folder(
    folder: Path, videos: int, broken: Sequence[str] = (), different: int = 4
) -> tuple[Path, dict[str, str]]:
    """`videos` clips of which the last ones are `broken` (kinds), each with a caption and a
    question, and ``manifest.jsonl``.

    different: number of distinct clips; they repeat.

    Returns:
        The manifest, and file name -> kind of the broken ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {f"clip-{videos - 1 - i:04d}.mp4": kind for i, kind in enumerate(broken)}
    rows = []
    for index in range(videos):
        path = folder / f"clip-{index:04d}.mp4"
        data, words = clip_bytes(index % different)
        if path.name in kinds:
            write_broken(path, kinds[path.name])
        else:
            path.write_bytes(data)
        for task, prompt, target in (
            ("caption", "Describe what happens in the video.", words),
            ("qa", "How many objects are there?", "One."),
        ):
            rows.append(
                {
                    "id": f"{path.stem}-{task}",
                    "video_path": path.name,
                    "task_type": task,
                    "prompt": prompt,
                    "target_text": target,
                    "dataset": "shapes",
                    "split": None,
                    "metadata": {},
                }
            )
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest, kinds
