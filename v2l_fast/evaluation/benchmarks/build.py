"""A manifest from a benchmark's folder: its annotations, its videos, the paper's sample sizes.

Responsible for files, sampling and the manifest's rows; annotation formats are `formats`'s.
"""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v2l_fast.data.manifest import write_manifest
from v2l_fast.errors import ConfigError
from v2l_fast.evaluation.benchmarks.annotations import VIDEO_SUFFIXES, BenchmarkError
from v2l_fast.evaluation.benchmarks.catalog import BENCHMARKS, Benchmark
from v2l_fast.evaluation.benchmarks.formats import Item
from v2l_fast.outputs import check_output
from v2l_fast.video import probe

# Missing videos that an error names before it counts the rest.
_NAMED = 5


@dataclass(frozen=True)
class Built:
    """Counts of a manifest: its examples and videos, and the videos that are not there."""

    examples: int
    videos: int
    missing: tuple[str, ...]


def build(
    name: str,
    folder: Path,
    out: Path,
    limit: int | None = None,
    seed: int = 0,
    skip_missing: bool = False,
) -> Built:
    """Write the manifest of a benchmark.

    Args:
        name: a key of BENCHMARKS.
        folder: holds the annotation files and, anywhere below it, the videos.
        limit: examples of each subset (videos of VidCapBench), drawn by `seed` from those whose
            video is there; the paper's number when None, all with 0.
        skip_missing: leave out examples whose video is not there.

    Raises:
        ConfigError: there is no such benchmark.
        BenchmarkError: a file is missing or not as published, or videos are missing.
        WriteError: `out` is one of the benchmark's own files, or cannot be written.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    annotations = [_annotations(benchmark, folder, name) for name in benchmark.files]
    items = benchmark.items(*annotations)
    found = _videos(folder)
    check_output(out, [*annotations, *found.values()], force=True)
    located = [(item, next((found[v] for v in item.videos if v in found), None)) for item in items]
    missing = tuple(dict.fromkeys(item.videos[0] for item, path in located if path is None))
    if missing and not skip_missing:
        named = ", ".join(missing[:_NAMED]) + (" ..." if len(missing) > _NAMED else "")
        raise BenchmarkError(
            f"{folder}: {len(missing)} of {benchmark.title}'s videos are not below it ({named}); "
            f"they are published at {benchmark.videos}; --skip-missing leaves them out"
        )
    present = [(item, path) for item, path in located if path is not None]
    if not present:
        raise BenchmarkError(
            f"{folder}: none of {benchmark.title}'s videos is below it; they are published at "
            f"{benchmark.videos}"
        )
    count = benchmark.limit if limit is None else limit
    chosen = _sample(present, count, benchmark.limit_videos, seed) if count else present
    out.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(out, (_row(benchmark, item, path, out.parent) for item, path in chosen))
    return Built(len(chosen), len({path for _, path in chosen}), missing)


def _annotations(benchmark: Benchmark, folder: Path, name: str) -> Path:
    """The file as published, or its name directly in the folder."""
    for path in (folder / name, folder / Path(name).name):
        if path.is_file():
            return path
    raise BenchmarkError(
        f"{folder}: {benchmark.title}'s {name} is not there; it is published at "
        f"{benchmark.published}"
    )


def _videos(folder: Path) -> dict[str, Path]:
    """Every video file below the folder, by name with and without its suffix."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file():
            found.setdefault(path.name, path)
            found.setdefault(path.stem, path)
    return found


def _sample(
    items: Sequence[tuple[Item, Path]], limit: int, by_video: bool, seed: int
) -> list[tuple[Item, Path]]:
    """`limit` of each subset, or of the videos, in the published order."""
    groups: dict[Any, dict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, (item, path) in enumerate(items):
        groups[item.subset][path if by_video else index].append(index)
    kept: list[int] = []
    for units in groups.values():
        names = list(units)
        if len(names) > limit:
            names = random.Random(seed).sample(names, limit)
        kept += [index for name in names for index in units[name]]
    return [items[index] for index in sorted(kept)]


def _row(benchmark: Benchmark, item: Item, path: Path, base: Path) -> Mapping[str, Any]:
    metadata = dict(item.metadata)
    if item.subset is not None:
        metadata["subset"] = item.subset
    if item.frames is not None:
        first, last, total = item.frames
        # Shares of the duration: right whatever frame rate the file was encoded at.
        duration = probe(path).duration
        start, end = first / total * duration, min(1.0, (last + 1) / total) * duration
        metadata["span"] = [round(start, 3), round(end, 3)]
    return {
        "id": f"{benchmark.title}/{item.id}",
        "video_path": os.path.relpath(path, base),
        "task_type": item.task_type,
        "prompt": item.prompt,
        "target_text": item.target.strip(),
        "dataset": benchmark.title,
        "split": benchmark.split,
        "metadata": metadata,
    }
