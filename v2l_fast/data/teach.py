"""Teacher targets: the answers of the frozen VLM itself, with the video in its context.

The hypernetwork then learns to make a model give the same answers without the video (Section 4.1
of the paper).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from v2l_fast.data.manifest import (
    Example,
    VideoExamples,
    group_by_video,
    load_manifest,
    write_manifest,
)
from v2l_fast.data.readers import ClipReader, Failure, read_ahead
from v2l_fast.data.shards import Line, Progress, Shards, run_on_ray
from v2l_fast.errors import ConfigError, VideoError
from v2l_fast.files import json_sha256, write_jsonl
from v2l_fast.generation import SamplingParams, answer_prompts
from v2l_fast.loading import shipped
from v2l_fast.outputs import check_folder
from v2l_fast.video import Clip
from v2l_fast.vlm import Backbone, VideoChunk, load_backbone

# Fields that a manifest must have; the teacher writes `target_text`.
REQUIRED = ("id", "video_path", "task_type", "prompt")


@dataclass(frozen=True)
class TeacherSettings:
    """The teacher, and how it answers.

    Attributes:
        base: the frozen VLM: "shapes-any" (shipped), a folder or a hub id.
        reader: reads frames as the hypernetwork will see them.
        max_new_tokens: limit of an answer; one that reaches it is marked as truncated.
        batch: prompts answered together.
        videos_per_shard: the most work that an interruption can cost.
        device: "cuda" or "cpu"; None prefers a GPU.
        dtype: "float32" or "bfloat16"; None is bfloat16 on a GPU and float32 on a CPU.
        threads: number that read videos ahead.
    """

    base: str
    reader: ClipReader
    max_new_tokens: int = 128
    batch: int = 16
    videos_per_shard: int = 32
    device: str | None = None
    dtype: str | None = None
    threads: int = 2

    def fingerprint(self) -> dict[str, Any]:
        """The settings that answers depend on."""
        free = {"device", "threads", "videos_per_shard", "reader"}
        settings = {k: v for k, v in asdict(self).items() if k not in free}
        reader = {"decoder": self.reader.decoder, "device": self.reader.device}
        return settings | asdict(self.reader.sampling) | reader


@dataclass(frozen=True)
class TeachResult:
    """The manifest, the number of answers in it, and the videos and questions left out."""

    manifest: Path
    answers: int
    failures: list[Failure]


class Teacher:
    """The work of a shard: numbers of videos -> a line for each answer or failure.

    It loads its model on construction, so a process keeps one.
    """

    def __init__(self, videos: Sequence[VideoExamples], settings: TeacherSettings) -> None:
        self.videos = videos
        self.settings = settings
        self.backbone = load_frozen(settings.base, settings.device, settings.dtype)

    def __call__(self, numbers: Sequence[int]) -> list[Line]:
        videos = [self.videos[number] for number in numbers]
        lines: list[Line] = []
        waiting: list[tuple[Example, VideoChunk]] = []
        clips = read_ahead(self._read, videos, self.settings.threads)
        for video, clip in zip(videos, clips, strict=True):
            if isinstance(clip, Failure):
                lines.append({"failure": asdict(clip)})
                continue
            encoded = self.backbone.encode(clip, self.settings.reader.sampling.longest_edge)
            for example in video.examples:
                waiting.append((example, encoded))
                if len(waiting) == self.settings.batch:
                    lines += self._answer(waiting)
                    waiting = []
        if waiting:
            lines += self._answer(waiting)
        return lines

    def _read(self, video: VideoExamples) -> Clip | Failure:
        try:
            return self.settings.reader.read(video, hash_file=False)[0]
        except VideoError as error:
            return Failure(video.name, str(error))

    def _answer(self, batch: Sequence[tuple[Example, VideoChunk]]) -> Iterator[Line]:
        """Greedy answers to one batch of prompts."""
        limit = self.settings.max_new_tokens
        prompts = [
            partial(self.backbone.video_prompt, chunk, example.prompt) for example, chunk in batch
        ]
        params = SamplingParams(max_new_tokens=limit)
        answers = answer_prompts(self.backbone, prompts, [None] * len(prompts), params)
        for (example, _), answer in zip(batch, answers, strict=True):
            text = answer.text
            if not text:
                reason = f"the teacher's answer to {example.id!r} is empty"
                yield {"failure": {"video": example.video_path, "reason": reason}}
                continue
            metadata = {k: v for k, v in example.metadata.items() if k != "truncated"}
            metadata["teacher"] = self.settings.base
            if example.target_text:
                metadata["reference"] = example.target_text
            if answer.new_tokens == limit:
                metadata["truncated"] = True
            yield {"row": example.row(target_text=text, metadata=metadata), "path": example.path}


def load_frozen(base: str, device: str | None = None, dtype: str | None = None) -> Backbone:
    """A frozen VLM by its shipped name, folder or hub id, compiled on a GPU.

    Raises:
        CheckpointError: it cannot be loaded.
        ConfigError: `device` is "cuda" and there is no GPU.
    """
    cuda = torch.cuda.is_available()
    target = torch.device(device or ("cuda" if cuda else "cpu"))
    if target.type == "cuda" and not cuda:
        raise ConfigError(f"device {device}: this machine has no usable GPU; see v2l doctor")
    default = torch.bfloat16 if target.type == "cuda" else torch.float32
    backbone = load_backbone(
        shipped(base, "base") or base, target, default if dtype is None else getattr(torch, dtype)
    )
    if target.type == "cuda":
        backbone.compile()
    return backbone


def teach(
    manifest: str | os.PathLike,
    out: str | os.PathLike,
    settings: TeacherSettings,
    root: str | os.PathLike | None = None,
    engine: str = "hf",
    workers: int = 1,
    progress: Progress = lambda done, total: None,
) -> TeachResult:
    """Answer every prompt of a manifest; continues an interrupted run.

    Args:
        out: folder of the shards, ``manifest.jsonl`` (paths relative to it) and
            ``quarantine.jsonl``.
        engine: "hf" in this process, or "ray" in `workers` processes of a Ray cluster.
        progress: called with the number of videos done and their total.

    Raises:
        ManifestError: the manifest cannot be used.
        ShardError: `out` holds another run, or the cluster did not finish it.
        WriteError: `out` holds the input manifest, or files that another program wrote.
    """
    # An earlier run's folder is continued; files of other programs are not overwritten.
    names = ("manifest.jsonl", "quarantine.jsonl")
    check_folder(out, names, [manifest], force=(Path(out) / "run.json").is_file())
    examples = load_manifest(manifest, root, required=REQUIRED)
    videos = group_by_video(examples)
    # Everything that the answers and their order depend on.
    inputs = [[e.id, e.video_path, e.span, e.prompt] for e in examples]
    fingerprint = settings.fingerprint() | {"manifest": json_sha256(*inputs)}
    shards = Shards.open(out, fingerprint, len(videos), settings.videos_per_shard)
    if engine == "ray":
        gpus = 0 if settings.device == "cpu" else None
        run_on_ray(shards, Teacher, (videos, settings), workers, gpus, progress)
    elif shards.missing():
        shards.run(Teacher(videos, settings), progress)
    return _gather(shards)


def _gather(shards: Shards) -> TeachResult:
    """Write the answers of all shards as one manifest, and the list of failures."""
    rows: list[Mapping[str, Any]] = []
    failures: list[Failure] = []
    for line in shards.lines():
        if "failure" in line:
            failures.append(Failure(**line["failure"]))
        else:
            path = os.path.relpath(line["path"], shards.folder)
            rows.append(line["row"] | {"video_path": path})
    target = shards.folder / "manifest.jsonl"
    write_manifest(target, rows)
    write_jsonl(shards.folder / "quarantine.jsonl", map(asdict, failures))
    return TeachResult(target, len(rows), failures)
