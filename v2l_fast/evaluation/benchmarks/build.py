"""The manifest of a benchmark, from the folder with its annotations and videos.

Responsible for the catalog of the nine benchmarks with the paper's sample sizes, for files, for
sampling and for the manifest's rows. Annotation formats are `formats`'s.
"""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v2l_fast.data.manifest import write_manifest
from v2l_fast.errors import ConfigError
from v2l_fast.evaluation.benchmarks import formats
from v2l_fast.evaluation.benchmarks.formats import (
    VIDEO_SUFFIXES,
    BenchmarkError,
    BenchmarkItem,
)
from v2l_fast.outputs import check_output
from v2l_fast.video import probe

# Number of missing videos that an error names.
_NAMED = 5


@dataclass(frozen=True)
class ManifestCounts:
    """Numbers of examples and videos in a manifest, and the missing videos."""

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
) -> ManifestCounts:
    """Write the manifest of a benchmark.

    Args:
        name: a key of BENCHMARKS.
        folder: contains the annotation files and, at any depth, the videos.
        limit: examples per subset (for VidCapBench: videos), drawn with `seed` from those with a
            video; None takes the paper's number, 0 all.
        skip_missing: leave out examples without a video.

    Raises:
        ConfigError: the name is unknown.
        BenchmarkError: a file is missing or not as published, or videos are missing.
        WriteError: `out` is one of the benchmark's own files, or cannot be written.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"unknown benchmark {name!r}; choose from {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    annotations = [_annotations(benchmark, folder, name) for name in benchmark.files]
    items = benchmark.items(*annotations)
    files = _videos(folder)
    check_output(out, [*annotations, *files.values()], force=True)
    located = [(item, next((files[v] for v in item.videos if v in files), None)) for item in items]
    missing = tuple(dict.fromkeys(item.videos[0] for item, path in located if path is None))
    if missing and not skip_missing:
        names = ", ".join(missing[:_NAMED]) + (" ..." if len(missing) > _NAMED else "")
        raise BenchmarkError(
            f"{folder}: {len(missing)} videos of {benchmark.title} are missing ({names}); get them "
            f"from {benchmark.videos} or leave them out with --skip-missing"
        )
    present = [(item, path) for item, path in located if path is not None]
    if not present:
        raise BenchmarkError(
            f"{folder}: all videos of {benchmark.title} are missing; get them from "
            f"{benchmark.videos}"
        )
    count = benchmark.limit if limit is None else limit
    sample = _sample(present, count, benchmark.limit_videos, seed) if count else present
    out.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(out, (_row(benchmark, item, path, out.parent) for item, path in sample))
    return ManifestCounts(len(sample), len({path for _, path in sample}), missing)


def _annotations(benchmark: Benchmark, folder: Path, name: str) -> Path:
    """The file at its published path, or directly in the folder."""
    for path in (folder / name, folder / Path(name).name):
        if path.is_file():
            return path
    raise BenchmarkError(
        f"{folder}: {name} of {benchmark.title} is missing; get it from {benchmark.published}"
    )


def _videos(folder: Path) -> dict[str, Path]:
    """Every video file below the folder, by its name with and without suffix."""
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file():
            files.setdefault(path.name, path)
            files.setdefault(path.stem, path)
    return files


def _sample(
    items: Sequence[tuple[BenchmarkItem, Path]], limit: int, by_video: bool, seed: int
) -> list[tuple[BenchmarkItem, Path]]:
    """`limit` examples per subset, or `limit` videos, in the published order."""
    groups: dict[Any, dict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, (item, path) in enumerate(items):
        groups[item.subset][path if by_video else index].append(index)
    indices: list[int] = []
    for units in groups.values():
        names = list(units)
        if len(names) > limit:
            names = random.Random(seed).sample(names, limit)
        indices += [index for name in names for index in units[name]]
    return [items[index] for index in sorted(indices)]


def _row(benchmark: Benchmark, item: BenchmarkItem, path: Path, base: Path) -> Mapping[str, Any]:
    metadata = dict(item.metadata)
    if item.subset is not None:
        metadata["subset"] = item.subset
    if item.frames is not None:
        first, last, total = item.frames
        # Fractions of the duration, which do not depend on the file's frame rate.
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


# --- catalog --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """Source of a benchmark and its sample size in the paper (Section 4.2).

    Attributes:
        title: the manifest's ``dataset``.
        files: annotation files, relative to the user's folder or directly in it.
        published: source of those files.
        videos: source of the videos.
        split: split of the annotation files.
        read: reads the files and yields items.
        limit: examples per subset, or videos if `limit_videos`. The paper's own selection is not
            published.
    """

    title: str
    files: tuple[str, ...]
    published: str
    videos: str
    split: str
    read: Callable[..., Iterator[BenchmarkItem]]
    limit: int = 500
    limit_videos: bool = False

    def items(self, *paths: Path) -> list[BenchmarkItem]:
        """All items of the files.

        Raises:
            BenchmarkError: a file is not as published.
        """
        items: list[BenchmarkItem] = []
        try:
            items.extend(self.read(*paths))
        except BenchmarkError:
            raise
        except (TypeError, AttributeError, LookupError, ValueError, ArithmeticError) as error:
            # A value of an unexpected type.
            files = " or ".join(map(str, paths))
            raise BenchmarkError(
                f"{files}: the entry after the first {len(items)} is not as published ({error}); "
                f"get the file from {self.published}"
            ) from None
        return items


_PLM = "https://huggingface.co/datasets/facebook/PLM-VideoBench"
_SA_V = "https://ai.meta.com/datasets/segment-anything-video-downloads (videos_fps_6.tar)"
_ACTIVITYNET = "http://activity-net.org/download.html (YouTube ids)"

BENCHMARKS = {
    "activitynet-captions": Benchmark(
        "ActivityNet Captions",
        ("val_1.json",),
        "https://cs.stanford.edu/people/ranjaykrishna/densevid/captions.zip",
        _ACTIVITYNET,
        "val",
        formats.activitynet_captions,
    ),
    "plm-rdcap": Benchmark(
        "PLM-RDCap", ("rdcap/plm_rdcap_test.jsonl",), _PLM, _SA_V, "test", formats.plm_rdcap
    ),
    "plm-rcap": Benchmark(
        "PLM-RCap", ("rcap/plm_rcap_test.jsonl",), _PLM, _SA_V, "test", formats.plm_rcap
    ),
    "vdc": Benchmark(
        "VDC",
        ("VDC_1k.jsonl",),
        "https://huggingface.co/datasets/wchai/Video-Detailed-Caption",
        "https://huggingface.co/datasets/wchai/Video-Detailed-Caption/tree/main/videos",
        "test",
        formats.vdc,
    ),
    "carebench": Benchmark(
        "CaReBench",
        ("json/metadata.json",),
        "https://huggingface.co/datasets/MCG-NJU/CaReBench",
        "https://huggingface.co/datasets/MCG-NJU/CaReBench (videos/videos.zip)",
        "test",
        formats.carebench,
    ),
    "nextqa": Benchmark(
        "NExT-QA (open)",
        ("dataset/nextqa/test.csv",),
        "https://github.com/doc-doc/NExT-OE",
        "https://github.com/doc-doc/NExT-QA (VidOR videos)",
        "test",
        formats.nextqa,
    ),
    "activitynet-qa": Benchmark(
        "ActivityNet-QA",
        ("dataset/test_q.json", "dataset/test_a.json"),
        "https://github.com/MILVLG/activitynet-qa",
        _ACTIVITYNET,
        "test",
        formats.activitynet_qa,
    ),
    "plm-sgqa": Benchmark(
        "PLM-SGQA",
        ("sgqa/plm_sgqa_test.jsonl",),
        _PLM,
        f"{_PLM}/tree/main/videos/sgqa",
        "test",
        formats.plm_sgqa,
    ),
    "vidcapbench": Benchmark(
        "VidCapBench",
        ("VidCapBench-AE_QA.jsonl",),
        "https://huggingface.co/datasets/VidCapBench/VidCapBench",
        "https://huggingface.co/datasets/VidCapBench/VidCapBench",
        "test",
        formats.vidcapbench,
        limit=100,
        limit_videos=True,
    ),
}
