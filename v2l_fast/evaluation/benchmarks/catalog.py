"""The nine benchmarks: their files, where those are published, and the paper's sample sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from v2l_fast.evaluation.benchmarks import formats
from v2l_fast.evaluation.benchmarks.annotations import BenchmarkError
from v2l_fast.evaluation.benchmarks.formats import Item


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
    read: Callable[..., Iterator[Item]]
    limit: int = 500
    limit_videos: bool = False

    def items(self, *paths: Path) -> list[Item]:
        """Every item of the files.

        Raises:
            BenchmarkError: a file is not as published.
        """
        items: list[Item] = []
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
