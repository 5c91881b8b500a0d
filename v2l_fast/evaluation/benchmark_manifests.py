"""Manifests of nine published benchmarks, from the files and videos as their authors publish them.

Each reader names the source of its format, what it was checked against, and what could not be
checked. The prompts are those of the paper's Appendix B and part of the measurement: with another
wording the numbers belong to another benchmark. The appendix prints a question and its instruction
as two paragraphs; here a space joins them, as in the examples on the authors' page (where
PLM-SGQA's questions stand without the instruction).
"""

from __future__ import annotations

import csv
import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from v2l_fast.data.manifest import write_manifest
from v2l_fast.errors import ConfigError, V2LError
from v2l_fast.files import LARGE_BYTES, read_json, read_jsonl, read_lines
from v2l_fast.outputs import check_output
from v2l_fast.video import probe

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")
_AGAIN = "download it again"
# Number of missing videos that an error names.
_NAMED = 5


class BenchmarkError(V2LError, ValueError):
    """An annotation file or a video of a benchmark is missing, or not as published."""


@dataclass(frozen=True)
class BenchmarkItem:
    """One example whose video file is not located yet.

    Attributes:
        id: unique within the benchmark.
        videos: possible names of its video, without suffix, the most likely first.
        frames: (first, last, total): the example is about these frames; None for all frames.
    """

    id: str
    videos: tuple[str, ...]
    task_type: str
    prompt: str
    target: str
    subset: str | None = None
    frames: tuple[int, int, int] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


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


# --- files ----------------------------------------------------------------------------------------


def _mapping(path: Path) -> Mapping[str, Any]:
    """The object of a JSON file. Raises BenchmarkError."""
    return read_json(path, LARGE_BYTES, BenchmarkError, kind=dict, remedy=_AGAIN)


def _list(path: Path) -> Iterator[tuple[str, Any]]:
    """("entry N", row) for each element of a JSON list. Raises BenchmarkError."""
    rows = read_json(path, LARGE_BYTES, BenchmarkError, kind=list, remedy=_AGAIN)
    return ((f"entry {number}", row) for number, row in enumerate(rows, start=1))


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """("line N", row) for each row of a JSON-lines file. Raises BenchmarkError."""
    rows = read_jsonl(path, BenchmarkError, remedy=_AGAIN)
    return ((f"line {number}", row) for number, row in rows)


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    """("line N", row) for each row of a CSV file with a header. Raises BenchmarkError."""
    reader = csv.DictReader(line for _, line in read_lines(path, BenchmarkError))
    try:
        for number, row in enumerate(reader, start=2):
            yield f"line {number}", row
    except csv.Error as error:
        raise BenchmarkError(
            f"{path}: line {reader.line_num} is not CSV ({error}); {_AGAIN}"
        ) from None


def _field(path: Path, where: str, row: Any, name: str) -> Any:
    """The value of a field that every row must have, not empty. Raises BenchmarkError."""
    value = row.get(name) if isinstance(row, dict) else None
    if value is None or value == "":
        raise BenchmarkError(
            f"{path}: {where} has no {name!r}; check that it is the published file"
        )
    return value


def _stem(name: str) -> str:
    """A video's name without folder and video suffix ("a.b" is not a suffix)."""
    path = Path(name)
    return path.stem if path.suffix.lower() in VIDEO_SUFFIXES else path.name


# --- captions -------------------------------------------------------------------------------------


def activitynet_captions(path: Path) -> Iterator[BenchmarkItem]:
    """{"v_ID": {"duration": s, "timestamps": [[start, end]], "sentences": [text]}}.

    The reference of the whole video is its sentences as listed: they are one annotator's paragraph,
    and their starts do not always ascend.

    Published in captions.zip at https://cs.stanford.edu/people/ranjaykrishna/densevid/. Checked
    against a copy of val_1.json. Not checked: which of the two annotations of the validation
    videos (val_1.json, val_2.json) the paper took, and whether it joined the sentences like this.
    """
    for video, row in _mapping(path).items():
        target = " ".join(str(s).strip() for s in _field(path, video, row, "sentences"))
        yield BenchmarkItem(video, (video,), "caption", ACTIVITYNET_CAPTIONS, target)


def plm_rdcap(path: Path) -> Iterator[BenchmarkItem]:
    """JSON lines: uid, video ("sav_....mp4"), masklet_id, total_frames, dense_captions:
    [{start_frame, end_frame, caption}].

    The captions are about one subject and cover the whole video, also where it is not visible; the
    reference is all of them in the order of time.

    Published at https://huggingface.co/datasets/facebook/PLM-VideoBench. Fields checked against
    its card and the benchmark's own evaluation in lmms-eval. Not checked: the file itself (its
    name follows those of its siblings), how a subject out of sight is worded, and whether the
    paper kept such captions.
    """
    for where, row in _lines(path):
        parts = _field(path, where, row, "dense_captions")
        parts = sorted(parts, key=lambda part: _field(path, where, part, "start_frame"))
        target = " ".join(_field(path, where, part, "caption").strip() for part in parts)
        yield _region(path, where, row, PLM_RDCAP, target, None)


def plm_rcap(path: Path) -> Iterator[BenchmarkItem]:
    """JSON lines: uid, video ("sav_....mp4"), masklet_id, total_frames, caption, start_frame,
    end_frame.

    Frames count at the annotations' 6 a second, from 0, the last one included; total_frames is the
    video's length in them.

    Published and checked like `plm_rdcap`. Not checked: the file itself (its name follows those of
    its siblings), and that the paper shows the span alone; its prompt asks about a "video clip".
    """
    for where, row in _lines(path):
        names = ("start_frame", "end_frame", "total_frames")
        first, last, total = (int(_field(path, where, row, name)) for name in names)
        target = _field(path, where, row, "caption")
        yield _region(path, where, row, PLM_RCAP, target, (first, last, total))


def vdc(path: Path) -> Iterator[BenchmarkItem]:
    """JSON lines: video_id, video_source, video_name (a file), and <style>_caption for each of the
    five styles.

    Published at https://huggingface.co/datasets/wchai/Video-Detailed-Caption. Checked against
    several programs that read the file. Not checked: the file itself.
    """
    for where, row in _lines(path):
        name = _stem(_field(path, where, row, "video_name"))
        for style, prompt in VDC.items():
            target = _field(path, where, row, f"{style}_caption")
            yield BenchmarkItem(f"{name}/{style}", (name,), "caption", prompt, target, style)


def carebench(path: Path) -> Iterator[BenchmarkItem]:
    """A list of {"video" (a file), "caption", "spatial_caption", "temporal_caption", "events",
    "objects", "category", "subcategory"}.

    Lists are joined by "; ", as in the references that the paper's authors show on their page.

    Published at https://huggingface.co/datasets/MCG-NJU/CaReBench. Checked against the CaReBench
    evaluation, against mteb's import of all 1,000 rows, and against the columns that the paper's
    authors name. Not checked: the file itself, and whether events and objects are lists (as the
    evaluation needs them) in every row; texts are taken as they are.
    """
    for where, row in _list(path):
        video = _stem(_field(path, where, row, "video"))
        for subset, prompt in CAREBENCH.items():
            target = _field(path, where, row, subset)
            if isinstance(target, list):
                target = "; ".join(str(part).strip() for part in target)
            yield BenchmarkItem(f"{video}/{subset}", (video,), "caption", prompt, target, subset)


def _region(
    path: Path,
    where: str,
    row: Mapping[str, Any],
    prompt: str,
    target: str,
    frames: tuple[int, int, int] | None,
) -> BenchmarkItem:
    uid, video = (_field(path, where, row, name) for name in ("uid", "video"))
    metadata = {"masklet_id": row.get("masklet_id")}
    names = (_stem(video),)
    return BenchmarkItem(
        str(uid), names, "caption", prompt, target, frames=frames, metadata=metadata
    )


# --- questions ------------------------------------------------------------------------------------


def nextqa(path: Path) -> Iterator[BenchmarkItem]:
    """CSV of the open-ended task: video, frame_count, width, height, question, answer, qid, type.

    Videos are VidOR's, of the same name. Published at https://github.com/doc-doc/NExT-OE; checked
    against its test.csv and NExT-QA's map_vid_vidorID.json. The second references of
    add_reference_answer_test.json, which its WUPS also uses, are not used; whether the paper
    uses them could not be checked.
    """
    for where, row in _csv(path):
        video = _field(path, where, row, "video")
        yield _question(
            f"{video}/{_field(path, where, row, 'qid')}",
            (video,),
            _field(path, where, row, "question"),
            _field(path, where, row, "answer"),
            row.get("type"),
        )


def activitynet_qa(questions: Path, answers: Path) -> Iterator[BenchmarkItem]:
    """Lists of {"video_name", "question", "question_id"} and {"answer", "type", "question_id"}.

    video_name is a YouTube id; ActivityNet's files are called v_ID. Published at
    https://github.com/MILVLG/activitynet-qa; checked against its test_q.json and test_a.json.
    """
    known = {_field(answers, where, row, "question_id"): row for where, row in _list(answers)}
    for where, row in _list(questions):
        name = _field(questions, where, row, "video_name")
        id_ = _field(questions, where, row, "question_id")
        if id_ not in known:
            raise BenchmarkError(f"{answers}: no answer to {id_}; use both files of one split")
        answer = _field(answers, id_, known[id_], "answer")
        text = _field(questions, where, row, "question")
        yield _question(id_, (f"v_{name}", name), text, str(answer), known[id_].get("type"))


def plm_sgqa(path: Path) -> Iterator[BenchmarkItem]:
    """JSON lines: uid, video (a file), question, answer, domain.

    Published and checked like `plm_rdcap`; "domain" is in the newest card only. Not checked: the
    file itself (its name follows those of its siblings).
    """
    for where, row in _lines(path):
        yield _question(
            str(_field(path, where, row, "uid")),
            (_stem(_field(path, where, row, "video")),),
            _field(path, where, row, "question"),
            _field(path, where, row, "answer"),
            row.get("domain"),
        )


def vidcapbench(path: Path) -> Iterator[BenchmarkItem]:
    """JSON lines, one a video: video_dir (a file, with or without the authors' folder), QA_pairs:
    [{"question", "answer", "sub_category", "primary_category"}].

    Published at https://huggingface.co/datasets/VidCapBench/VidCapBench; checked against copies of
    VidCapBench-AE_QA.jsonl and VidCapBench-HE_QA.jsonl and the authors' eval.py. All examples that
    the paper's authors show are from the first file, so the second is not read; that the 1,523
    pairs are all from it could not be checked.
    """
    for where, row in _lines(path):
        video = _stem(_field(path, where, row, "video_dir"))
        for number, pair in enumerate(_field(path, where, row, "QA_pairs")):
            yield _question(
                f"{video}/{number}",
                (video,),
                _field(path, where, pair, "question"),
                _field(path, where, pair, "answer"),
                pair.get("sub_category"),
            )


def _question(
    id_: str, videos: tuple[str, ...], text: str, answer: str, kind: str | int | None
) -> BenchmarkItem:
    metadata = {} if kind is None else {"kind": kind}
    return BenchmarkItem(id_, videos, "qa", _question_prompt(text), answer, metadata=metadata)


# --- prompts --------------------------------------------------------------------------------------

ACTIVITYNET_CAPTIONS = "Describe what is happening in this video."
PLM_RDCAP = "Describe what happens in this video."
PLM_RCAP = "Describe what happens in this video clip."

# subset -> prompt
VDC = {
    "short": "Summarize this video in one detailed sentence.",
    "detailed": "Describe this video in detail.",
    "camera": "Describe the camera work, framing, and viewpoint in this video.",
    "background": "Describe the background, setting, and environment in this video.",
    "main_object": "Describe the main subject and its actions in this video.",
}
CAREBENCH = {
    "caption": (
        "Describe the video in as much useful visual detail as possible. Include the main "
        "activity, visible people or objects, scene context, appearance, and any important visual "
        "details that help explain what is happening."
    ),
    "events": (
        "Describe the key visible events in chronological order. Include all important actions "
        "and changes you can observe, with enough detail to distinguish each event clearly."
    ),
    "objects": (
        "Describe the important visible objects and entities in the video in as much useful "
        "detail as possible. Include their appearance, location, and role in the scene when "
        "visible."
    ),
    "spatial_caption": (
        "Describe the spatial layout in as much useful detail as possible: where the people, "
        "objects, and scene elements are located, how they are positioned relative to each other, "
        "and what parts of the scene are in the foreground, background, left, right, center, "
        "above, or below."
    ),
    "temporal_caption": (
        "Describe the temporal progression in as much useful detail as possible. Explain what "
        "happens over time, the order of visible actions, and how the scene or subjects change "
        "from the beginning to the end."
    ),
}


def _question_prompt(text: str) -> str:
    """The prompt template of all four question benchmarks."""
    return f"{text.strip()} Answer only the question, in one sentence."


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
        activitynet_captions,
    ),
    "plm-rdcap": Benchmark(
        "PLM-RDCap", ("rdcap/plm_rdcap_test.jsonl",), _PLM, _SA_V, "test", plm_rdcap
    ),
    "plm-rcap": Benchmark("PLM-RCap", ("rcap/plm_rcap_test.jsonl",), _PLM, _SA_V, "test", plm_rcap),
    "vdc": Benchmark(
        "VDC",
        ("VDC_1k.jsonl",),
        "https://huggingface.co/datasets/wchai/Video-Detailed-Caption",
        "https://huggingface.co/datasets/wchai/Video-Detailed-Caption/tree/main/videos",
        "test",
        vdc,
    ),
    "carebench": Benchmark(
        "CaReBench",
        ("json/metadata.json",),
        "https://huggingface.co/datasets/MCG-NJU/CaReBench",
        "https://huggingface.co/datasets/MCG-NJU/CaReBench (videos/videos.zip)",
        "test",
        carebench,
    ),
    "nextqa": Benchmark(
        "NExT-QA (open)",
        ("dataset/nextqa/test.csv",),
        "https://github.com/doc-doc/NExT-OE",
        "https://github.com/doc-doc/NExT-QA (VidOR videos)",
        "test",
        nextqa,
    ),
    "activitynet-qa": Benchmark(
        "ActivityNet-QA",
        ("dataset/test_q.json", "dataset/test_a.json"),
        "https://github.com/MILVLG/activitynet-qa",
        _ACTIVITYNET,
        "test",
        activitynet_qa,
    ),
    "plm-sgqa": Benchmark(
        "PLM-SGQA",
        ("sgqa/plm_sgqa_test.jsonl",),
        _PLM,
        f"{_PLM}/tree/main/videos/sgqa",
        "test",
        plm_sgqa,
    ),
    "vidcapbench": Benchmark(
        "VidCapBench",
        ("VidCapBench-AE_QA.jsonl",),
        "https://huggingface.co/datasets/VidCapBench/VidCapBench",
        "https://huggingface.co/datasets/VidCapBench/VidCapBench",
        "test",
        vidcapbench,
        limit=100,
        limit_videos=True,
    ),
}
