"""The annotation formats of the nine benchmarks, as their authors publish them, and their prompts.

Responsible for turning rows of those files into items. Reading files is `annotations`'s, sampling
and writing the manifest `build`'s. Each reader names the source of its format, what it was checked
against, and what could not be checked.

The prompts are those of the paper's Appendix B and part of the measurement: with another wording
the numbers belong to another benchmark. The appendix prints a question and its instruction as two
paragraphs; here a space joins them, as in the examples on the authors' page (where PLM-SGQA's
questions stand without the instruction).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from v2l_fast import files
from v2l_fast.errors import V2LError

_AGAIN = "download it again"
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")


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


# --- files ----------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises BenchmarkError."""
    return files.read_json(path, files.LARGE_BYTES, BenchmarkError, remedy=_AGAIN)


def read_mapping(path: Path) -> Mapping[str, Any]:
    """The object of a JSON file. Raises BenchmarkError."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise BenchmarkError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def read_list(path: Path) -> Iterator[tuple[str, Any]]:
    """("entry N", row) for each element of a JSON list. Raises BenchmarkError."""
    value = read_json(path)
    if not isinstance(value, list):
        raise BenchmarkError(f"{path}: must hold a JSON list, got {type(value).__name__}")
    for number, row in enumerate(value, start=1):
        yield f"entry {number}", row


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """("line N", row) for each row of a JSON-lines file. Raises BenchmarkError."""
    for number, row in files.read_jsonl(path, BenchmarkError, remedy=_AGAIN):
        yield f"line {number}", row


def read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    """("line N", row) for each row of a CSV file with a header. Raises BenchmarkError."""
    reader = csv.DictReader(line for _, line in files.read_lines(path, BenchmarkError))
    try:
        for number, row in enumerate(reader, start=2):
            yield f"line {number}", row
    except csv.Error as error:
        raise BenchmarkError(
            f"{path}: line {reader.line_num} is not CSV ({error}); {_AGAIN}"
        ) from None


def get(path: Path, where: str, row: Any, name: str) -> Any:
    """The value of a field that every row must have, not empty. Raises BenchmarkError."""
    value = row.get(name) if isinstance(row, dict) else None
    if value is None or value == "":
        raise BenchmarkError(
            f"{path}: {where} has no {name!r}; check that it is the published file"
        )
    return value


def stem(name: str) -> str:
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
    for video, row in read_mapping(path).items():
        target = " ".join(str(s).strip() for s in get(path, video, row, "sentences"))
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
    for where, row in read_lines(path):
        parts = get(path, where, row, "dense_captions")
        parts = sorted(parts, key=lambda part: get(path, where, part, "start_frame"))
        target = " ".join(get(path, where, part, "caption").strip() for part in parts)
        yield _region(path, where, row, PLM_RDCAP, target, None)


def plm_rcap(path: Path) -> Iterator[BenchmarkItem]:
    """JSON lines: uid, video ("sav_....mp4"), masklet_id, total_frames, caption, start_frame,
    end_frame.

    Frames count at the annotations' 6 a second, from 0, the last one included; total_frames is the
    video's length in them.

    Published and checked like `plm_rdcap`. Not checked: the file itself (its name follows those of
    its siblings), and that the paper shows the span alone; its prompt asks about a "video clip".
    """
    for where, row in read_lines(path):
        names = ("start_frame", "end_frame", "total_frames")
        first, last, total = (int(get(path, where, row, name)) for name in names)
        target = get(path, where, row, "caption")
        yield _region(path, where, row, PLM_RCAP, target, (first, last, total))


def vdc(path: Path) -> Iterator[BenchmarkItem]:
    """JSON lines: video_id, video_source, video_name (a file), and <style>_caption for each of the
    five styles.

    Published at https://huggingface.co/datasets/wchai/Video-Detailed-Caption. Checked against
    several programs that read the file. Not checked: the file itself.
    """
    for where, row in read_lines(path):
        name = stem(get(path, where, row, "video_name"))
        for style, prompt in VDC.items():
            target = get(path, where, row, f"{style}_caption")
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
    for where, row in read_list(path):
        video = stem(get(path, where, row, "video"))
        for subset, prompt in CAREBENCH.items():
            target = get(path, where, row, subset)
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
    uid, video = (get(path, where, row, name) for name in ("uid", "video"))
    metadata = {"masklet_id": row.get("masklet_id")}
    names = (stem(video),)
    return BenchmarkItem(
        str(uid), names, "caption", prompt, target, frames=frames, metadata=metadata
    )


# --- questions ------------------------------------------------------------------------------------


def nextqa(path: Path) -> Iterator[BenchmarkItem]:
    """CSV of the open-ended task: video, frame_count, width, height, question, answer, qid, type.

    Videos are VidOR's, of the same name. Published at https://github.com/doc-doc/NExT-OE; checked
    against its test.csv and NExT-QA's map_vid_vidorID.json. The second references of
    add_reference_answer_test.json, which its WUPS takes besides, are not used; whether the paper
    uses them could not be checked.
    """
    for where, row in read_csv(path):
        video = get(path, where, row, "video")
        yield _question(
            f"{video}/{get(path, where, row, 'qid')}",
            (video,),
            get(path, where, row, "question"),
            get(path, where, row, "answer"),
            row.get("type"),
        )


def activitynet_qa(questions: Path, answers: Path) -> Iterator[BenchmarkItem]:
    """Lists of {"video_name", "question", "question_id"} and {"answer", "type", "question_id"}.

    video_name is a YouTube id; ActivityNet's files are called v_ID. Published at
    https://github.com/MILVLG/activitynet-qa; checked against its test_q.json and test_a.json.
    """
    known = {get(answers, where, row, "question_id"): row for where, row in read_list(answers)}
    for where, row in read_list(questions):
        name = get(questions, where, row, "video_name")
        id_ = get(questions, where, row, "question_id")
        if id_ not in known:
            raise BenchmarkError(f"{answers}: no answer to {id_}; use both files of one split")
        answer = get(answers, id_, known[id_], "answer")
        text = get(questions, where, row, "question")
        yield _question(id_, (f"v_{name}", name), text, str(answer), known[id_].get("type"))


def plm_sgqa(path: Path) -> Iterator[BenchmarkItem]:
    """JSON lines: uid, video (a file), question, answer, domain.

    Published and checked like `plm_rdcap`; "domain" is in the newest card only. Not checked: the
    file itself (its name follows those of its siblings).
    """
    for where, row in read_lines(path):
        yield _question(
            str(get(path, where, row, "uid")),
            (stem(get(path, where, row, "video")),),
            get(path, where, row, "question"),
            get(path, where, row, "answer"),
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
    for where, row in read_lines(path):
        video = stem(get(path, where, row, "video_dir"))
        for number, pair in enumerate(get(path, where, row, "QA_pairs")):
            yield _question(
                f"{video}/{number}",
                (video,),
                get(path, where, pair, "question"),
                get(path, where, pair, "answer"),
                pair.get("sub_category"),
            )


def _question(
    id_: str, videos: tuple[str, ...], text: str, answer: str, kind: str | int | None
) -> BenchmarkItem:
    metadata = {} if kind is None else {"kind": kind}
    return BenchmarkItem(id_, videos, "qa", question_prompt(text), answer, metadata=metadata)


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


def question_prompt(text: str) -> str:
    """The prompt template of all four question benchmarks."""
    return f"{text.strip()} Answer only the question, in one sentence."
