"""Training spans from FineVideo: single scenes, runs of adjacent scenes, whole videos, mixed.

Spans follow Section 4.1 of the paper (60 % scenes, 30 % adjacent scenes, 10 % whole videos). The
manifest has prompts and splits; the answers are the teacher's (`v2l teach`).

The folder holds the data set's two columns as files, as its card writes them
(``videos/sample_0.mp4`` and ``metadata/sample_0.json``) or side by side (``a.mp4``, ``a.json``).
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from v2l_fast.data.manifest import video_share, write_manifest
from v2l_fast.errors import V2LError
from v2l_fast.files import read_json

PUBLISHED = "https://huggingface.co/datasets/HuggingFaceFV/finevideo"
MIX = {"scene": 0.6, "adjacent": 0.3, "full": 0.1}
# Scenes of an adjacent span.
ADJACENT = (2, 3)
# Largest gap or overlap of adjacent scenes, seconds.
GAP = 1.0


class FineVideoError(V2LError):
    """A FineVideo folder cannot be used."""


@dataclass(frozen=True)
class Span:
    """A part of a video, or all of it.

    Attributes:
        video: path within the folder.
        pool: "scene", "adjacent" or "full".
        start, end: seconds; None for the whole video.
        scenes: positions in the metadata's list of scenes.
        questions: of the metadata, for the whole video.
    """

    video: str
    pool: str
    start: float | None = None
    end: float | None = None
    scenes: tuple[int, ...] = ()
    questions: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        stem = Path(self.video).with_suffix("").as_posix()
        scenes = f"-{self.scenes[0]}-{self.scenes[-1]}" if self.scenes else ""
        return f"finevideo-{stem}-{self.pool}{scenes}"


@dataclass(frozen=True)
class Pools:
    """All spans of a folder.

    Attributes:
        spans: pool -> its spans.
        videos: number of videos read.
        left_out: file name -> why its metadata could not be used.
    """

    spans: Mapping[str, list[Span]]
    videos: int = 0
    left_out: Mapping[str, str] = field(default_factory=dict)


def read_pools(folder: str | os.PathLike) -> Pools:
    """The spans of every video in a folder and its subfolders, in the order of their names.

    Raises:
        FineVideoError: no such folder, or no video with metadata in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FineVideoError(
            f"{folder}: no such folder; FineVideo is published at {PUBLISHED} (log in and accept "
            "its terms); save each row's columns as videos/<name>.mp4 and metadata/<name>.json"
        )
    spans: dict[str, list[Span]] = {pool: [] for pool in MIX}
    left_out: dict[str, str] = {}
    videos = 0
    for path, video in _pairs(folder):
        name = video.relative_to(folder).as_posix()
        videos += 1
        try:
            candidates = list(video_spans(name, read_json(path)))
        except (ValueError, V2LError) as error:
            left_out[name] = f"its metadata cannot be read ({error})"
            continue
        if not any(span.scenes for span in candidates):
            left_out[name] = "its metadata has no scene with times; only the whole video is used"
        for span in candidates:
            spans[span.pool].append(span)
    if not videos:
        raise FineVideoError(
            f"{folder}: no <name>.json with a <name>.mp4 of its own; save each row's columns of "
            f"{PUBLISHED} as videos/<name>.mp4 and metadata/<name>.json"
        )
    return Pools(spans, videos, left_out)


def _pairs(folder: Path) -> Iterator[tuple[Path, Path]]:
    """(metadata, video): the video next to it, else the only one of its name in the folder."""
    named: dict[str, list[Path]] = {}
    for video in sorted(folder.rglob("*.mp4")):
        named.setdefault(video.stem, []).append(video)
    for path in sorted(folder.rglob("*.json")):
        videos = named.get(path.stem, [])
        beside = path.with_suffix(".mp4")
        if beside in videos:
            yield path, beside
        elif len(videos) == 1:
            yield path, videos[0]


def video_spans(video: str, metadata: Any) -> Iterator[Span]:
    """Every span that the metadata of a video defines.

    Raises:
        ValueError: the metadata is not FineVideo's.
    """
    content = metadata.get("content_metadata") if isinstance(metadata, dict) else None
    if not isinstance(content, dict):
        raise ValueError("it has no content_metadata")
    times = list(_scene_times(content.get("scenes"), metadata.get("duration_seconds")))
    for number, (start, end) in times:
        yield Span(video, "scene", start, end, (number,))
    for length in ADJACENT:
        for first in range(len(times) - length + 1):
            run = times[first : first + length]
            if _adjacent(run):
                numbers = tuple(number for number, _ in run)
                yield Span(video, "adjacent", run[0][1][0], run[-1][1][1], numbers)
    pairs = content.get("qAndA")
    pairs = pairs if isinstance(pairs, list) else []
    texts = [pair.get("question") for pair in pairs if isinstance(pair, dict)]
    questions = tuple(t.strip() for t in texts if isinstance(t, str) and t.strip())
    yield Span(video, "full", questions=questions)


def seconds(timestamp: Any) -> float | None:
    """ "H:MM:SS.mmm" or "MM:SS.mmm" in seconds; None for anything else."""
    match = re.fullmatch(r"(?:(\d{1,9}):)?(\d{1,9}):(\d\d?(?:\.\d*)?)", str(timestamp).strip())
    if match is None or float(match[3]) >= 60:
        return None
    return 3600 * int(match[1] or 0) + 60 * int(match[2]) + float(match[3])


def mix_spans(
    pools: Pools, total: int | None = None, mix: Mapping[str, float] = MIX, seed: int = 0
) -> list[Span]:
    """Draw spans from the pools in the ratio `mix`, without repeats, in random order.

    Args:
        total: number of spans; None takes as many as the ratio allows.

    Raises:
        FineVideoError: a pool is too small for its share of `total`.
    """
    shares = {pool: share / sum(mix.values()) for pool, share in mix.items() if share > 0}
    if total is None:
        total = min(_floor(len(pools.spans[pool]) / share) for pool, share in shares.items())
        if not total:
            sizes = ", ".join(f"{pool} {len(pools.spans[pool])}" for pool in shares)
            raise FineVideoError(f"the pools are too small for the mix ({sizes}); change the mix")
    counts = {pool: _floor(total * share) for pool, share in shares.items()}
    # Rounding down leaves some spans over; they go to the largest remainders.
    by_remainder = sorted(shares, key=lambda pool: counts[pool] - total * shares[pool])
    for pool in by_remainder[: total - sum(counts.values())]:
        counts[pool] += 1
    rng = random.Random(seed)
    chosen = []
    for pool, count in counts.items():
        spans = pools.spans[pool]
        if count > len(spans):
            raise FineVideoError(
                f"{total} spans need {count} of the pool {pool!r}, which has {len(spans)}; take "
                "fewer spans, or change the mix"
            )
        chosen += rng.sample(spans, count)
    rng.shuffle(chosen)
    return chosen


def _scene_times(scenes: Any, duration: Any) -> Iterator[tuple[int, tuple[float, float]]]:
    """(position, (start, end)) of each scene with valid times, cut to the video's duration."""
    # The duration is in whole seconds.
    limit = duration + 1 if isinstance(duration, int | float) and duration > 0 else math.inf
    for number, scene in enumerate(scenes if isinstance(scenes, list) else []):
        times = scene.get("timestamps") if isinstance(scene, dict) else None
        if not isinstance(times, dict):
            continue
        start, end = seconds(times.get("start_timestamp")), seconds(times.get("end_timestamp"))
        if start is None or end is None:
            continue
        if start < min(end, limit):
            yield number, (start, min(end, limit))


def _floor(value: float) -> int:
    """`value` rounded down; values that rounding errors put just below an integer give it."""
    return math.floor(value + 1e-9)


def _adjacent(run: Sequence[tuple[int, tuple[float, float]]]) -> bool:
    """Whether the scenes follow each other, in the list and in time."""
    return all(
        after == before + 1 and first_end - GAP <= next_start <= first_end + GAP
        for (before, (_, first_end)), (after, (next_start, _)) in zip(run, run[1:], strict=False)
    )


# As many per pool as the released recipe has, in other words.
PROMPTS = {
    "scene": ("Describe what happens in this scene.", "Sum up this scene in a few sentences."),
    "adjacent": (
        "Describe what happens in this part of the video, in order.",
        "Sum up this part of the video.",
    ),
    "full": ("Sum up this video in one to three sentences.",),
}


@dataclass(frozen=True)
class BuildResult:
    """The rows written, and the pools they were drawn from."""

    rows: list[dict[str, Any]]
    pools: Pools


def build_manifest(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    total: int | None = None,
    mix: Mapping[str, float] = MIX,
    val_share: float = 0.01,
    questions: int = 0,
    seed: int = 0,
) -> BuildResult:
    """Write a manifest of spans without targets.

    Args:
        val_share: share of the videos whose spans are the split "val".
        questions: limit on the metadata's questions per whole video, added as prompts.
    """
    pools = read_pools(folder)
    home = Path(out).resolve().parent
    home.mkdir(parents=True, exist_ok=True)
    base = os.path.relpath(Path(folder), home)
    rows: list[dict[str, Any]] = []
    for span in mix_spans(pools, total, mix, seed):
        split = "val" if video_share(span.video, seed) < val_share else "train"
        rows += _rows(span, base, split, questions)
    write_manifest(out, rows)
    return BuildResult(rows, pools)


def _rows(span: Span, base: str, split: str, questions: int) -> Iterator[dict[str, Any]]:
    prompts = PROMPTS[span.pool]
    chosen = prompts[hashlib.sha256(span.id.encode()).digest()[0] % len(prompts)]
    metadata: dict[str, Any] = {"pool": span.pool, "video_id": span.video}
    if span.start is not None:
        metadata |= {"span": [span.start, span.end], "scenes": list(span.scenes)}
    tasks = [("caption", "", chosen)]
    tasks += [("qa", f"-q{n}", text) for n, text in enumerate(span.questions[:questions])]
    for task_type, suffix, prompt in tasks:
        yield {
            "id": span.id + suffix,
            "video_path": os.path.join(base, span.video),
            "task_type": task_type,
            "prompt": prompt,
            "target_text": "",
            "dataset": "finevideo",
            "split": split,
            "metadata": metadata,
        }
