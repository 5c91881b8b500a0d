"""The annotation formats of the nine benchmarks, as their authors publish them.

Responsible for turning rows of those files into items. Where the files come from is `catalog`'s,
finding them, sampling and writing the manifest `build`'s. What could not be checked against the
published files is said at its reader.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from v2l_fast.errors import V2LError
from v2l_fast.evaluation.benchmarks import prompts

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")


class BenchmarkError(V2LError, ValueError):
    """An annotation file or a video of a benchmark is missing or not as published."""


@dataclass(frozen=True)
class Item:
    """One example before its video is found.

    Attributes:
        id: unique within the benchmark.
        videos: names its video may have, without a suffix, the likeliest first.
        frames: (first, last, all), the frames of the video it is about; None for all of them.
    """

    id: str
    videos: tuple[str, ...]
    task_type: str
    prompt: str
    target: str
    subset: str | None = None
    frames: tuple[int, int, int] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


# --- readers --------------------------------------------------------------------------------------


def activitynet_captions(path: Path) -> Iterator[Item]:
    """{"v_ID": {"duration", "timestamps": [[s, e]], "sentences": [text]}}.

    The reference of the whole video is its sentences in order.
    """
    for video, row in _mapping(path, _json(path)).items():
        sentences = _get(path, video, row, "sentences")
        target = " ".join(str(s).strip() for s in sentences)
        yield Item(video, (video,), "caption", prompts.ACTIVITYNET_CAPTIONS, target)


def plm_rdcap(path: Path) -> Iterator[Item]:
    """JSON lines: uid, video, masklet_id, total_frames, dense_captions: [{start_frame, end_frame,
    caption}]. The reference is all captions in the order of time."""
    for where, row in _json_lines(path):
        parts = _get(path, where, row, "dense_captions")
        parts = sorted(parts, key=lambda part: part["start_frame"])
        target = " ".join(_get(path, where, part, "caption").strip() for part in parts)
        yield Item(
            str(_get(path, where, row, "uid")),
            (_stem(_get(path, where, row, "video")),),
            "caption",
            prompts.PLM_RDCAP,
            target,
            metadata={"masklet_id": row.get("masklet_id")},
        )


def plm_rcap(path: Path) -> Iterator[Item]:
    """JSON lines: uid, video, masklet_id, total_frames, caption, start_frame, end_frame."""
    for where, row in _json_lines(path):
        names = ("start_frame", "end_frame", "total_frames")
        first, last, total = (int(_get(path, where, row, name)) for name in names)
        yield Item(
            str(_get(path, where, row, "uid")),
            (_stem(_get(path, where, row, "video")),),
            "caption",
            prompts.PLM_RCAP,
            _get(path, where, row, "caption"),
            frames=(first, last, total),
            metadata={"masklet_id": row.get("masklet_id")},
        )


def plm_sgqa(path: Path) -> Iterator[Item]:
    """JSON lines: uid, video, question, answer, domain."""
    for where, row in _json_lines(path):
        yield _question(
            str(_get(path, where, row, "uid")),
            (_stem(_get(path, where, row, "video")),),
            _get(path, where, row, "question"),
            _get(path, where, row, "answer"),
            row.get("domain"),
        )


def vdc(path: Path) -> Iterator[Item]:
    """JSON lines: video_id, video_name, and a field <style>_caption for each of five styles."""
    for where, row in _json_lines(path):
        name = _get(path, where, row, "video_name")
        for style, prompt in prompts.VDC.items():
            target = _get(path, where, row, f"{style}_caption")
            names = (_stem(name), name)
            yield Item(f"{name}/{style}", names, "caption", prompt, target, style)


def carebench(path: Path) -> Iterator[Item]:
    """A list of {"video", "caption", "events", "objects", "spatial_caption", "temporal_caption"};
    events and objects are lists or texts. ("video" was seen in code that reads the file; the other
    names follow the paper's subsets and were not checked against it.)"""
    rows = _json(path)
    if not isinstance(rows, list):
        raise BenchmarkError(f"{path}: holds a JSON {type(rows).__name__}, not the published list")
    for number, row in enumerate(rows, start=1):
        where = f"entry {number}"
        video = _stem(_get(path, where, row, "video"))
        for subset, prompt in prompts.CAREBENCH.items():
            target = _get(path, where, row, subset)
            if isinstance(target, list):
                target = "; ".join(str(part).strip() for part in target)
            yield Item(f"{video}/{subset}", (video,), "caption", prompt, target, subset)


def nextqa(path: Path) -> Iterator[Item]:
    """CSV of the open-ended task: video, frame_count, width, height, question, answer, qid,
    type."""
    with open(path, newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            where = f"line {number}"
            video = _get(path, where, row, "video")
            yield _question(
                f"{video}/{_get(path, where, row, 'qid')}",
                (video,),
                _get(path, where, row, "question"),
                _get(path, where, row, "answer"),
                row.get("type"),
            )


def activitynet_qa(questions: Path, answers: Path) -> Iterator[Item]:
    """Lists of {"video_name", "question", "question_id"} and {"answer", "type", "question_id"}."""
    known = {
        _get(answers, f"entry {i}", row, "question_id"): row
        for i, row in enumerate(_json(answers), start=1)
    }
    for number, row in enumerate(_json(questions), start=1):
        where = f"entry {number}"
        name = _get(questions, where, row, "video_name")
        id_ = _get(questions, where, row, "question_id")
        if id_ not in known:
            raise BenchmarkError(f"{answers}: no answer to {id_}; take both files of one split")
        answer = _get(answers, id_, known[id_], "answer")
        text = _get(questions, where, row, "question")
        yield _question(id_, (f"v_{name}", name), text, str(answer), known[id_].get("type"))


def vidcapbench(path: Path) -> Iterator[Item]:
    """JSON lines, one a video: video_dir (or video), QA_pairs: [{"question", "answer",
    "sub_category"}]. (Names as in the authors' eval.py; not checked against the file itself.)"""
    for where, row in _json_lines(path):
        video = _stem(row.get("video") or _get(path, where, row, "video_dir"))
        for number, pair in enumerate(_get(path, where, row, "QA_pairs")):
            yield _question(
                f"{video}/{number}",
                (video,),
                _get(path, where, pair, "question"),
                _get(path, where, pair, "answer"),
                pair.get("sub_category"),
            )


def _question(
    id_: str, videos: tuple[str, ...], text: str, answer: str, kind: str | int | None
) -> Item:
    metadata = {} if kind is None else {"kind": kind}
    return Item(id_, videos, "qa", prompts.question(text), answer, metadata=metadata)


# --- files ----------------------------------------------------------------------------------------


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BenchmarkError(f"{path}: not JSON ({error}); download it again") from None


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except ValueError as error:
                    raise BenchmarkError(
                        f"{path}: line {number} is not JSON ({error}); download it again"
                    ) from None


def _mapping(path: Path, found: Any) -> Mapping[str, Any]:
    if not isinstance(found, dict):
        raise BenchmarkError(f"{path}: holds a JSON {type(found).__name__}, an object is published")
    return found


def _get(path: Path, where: str, row: Any, name: str) -> Any:
    value = row.get(name) if isinstance(row, dict) else None
    if value is None or value == "":
        raise BenchmarkError(
            f"{path}: {where} has no {name!r}; is it the file that the benchmark publishes?"
        )
    return value


def _stem(name: str) -> str:
    """A video's name without folder and video suffix ("a.b" is not a suffix)."""
    path = Path(name)
    return path.stem if path.suffix.lower() in VIDEO_SUFFIXES else path.name
