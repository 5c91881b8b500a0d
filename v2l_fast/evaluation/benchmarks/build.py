"""A manifest from a benchmark's folder: its annotations, its videos, the paper's sample sizes.

Responsible for files, sampling and the manifest's rows; annotation formats are `formats`'s.
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
from v2l_fast.evaluation.benchmarks.annotations import VIDEO_SUFFIXES, BenchmarkError
from v2l_fast.evaluation.benchmarks.formats import BenchmarkItem
from v2l_fast.outputs import check_output
from v2l_fast.video import probe

# Missing videos that an error names before it counts the rest.
_NAMED = 5


@dataclass(frozen=True)
class ManifestCounts:
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
) -> ManifestCounts:
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
    return ManifestCounts(len(chosen), len({path for _, path in chosen}), missing)


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
    items: Sequence[tuple[BenchmarkItem, Path]], limit: int, by_video: bool, seed: int
) -> list[tuple[BenchmarkItem, Path]]:
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


def _row(benchmark: Benchmark, item: BenchmarkItem, path: Path, base: Path) -> Mapping[str, Any]:
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


# --- catalog --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark comes from and how the paper samples it (Section 4.2).

    Attributes:
        title: the manifest's ``dataset``.
        files: annotation files, relative to the user's folder; the file's name alone is enough.
        published: where those files are.
        videos: where the videos are.
        split: the split the files belong to.
        read: the files -> items.
        limit: examples taken (of each subset), or videos where `limit_videos`. Which ones the
            paper took is not published.
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
        """Every item of the files.

        Raises:
            BenchmarkError: a file is not as published.
        """
        items: list[BenchmarkItem] = []
        try:
            items.extend(self.read(*paths))
        except BenchmarkError:
            raise
        except (TypeError, AttributeError, LookupError, ValueError, ArithmeticError) as error:
            # A value of another type than is published.
            named = " or ".join(map(str, paths))
            raise BenchmarkError(
                f"{named}: an entry after the first {len(items)} is not as published ({error}); "
                f"get it from {self.published}"
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
