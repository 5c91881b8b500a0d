"""Teacher targets: what the frozen VLM itself answers with the video in its context.

Responsible for asking and for the manifest of answers. Shards, resuming and clusters are
`shards`' and `shards_ray`'s; the hypernetwork then learns to make the same model answer the same
without the video (Section 4.1 of the paper).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
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
from v2l_fast.data.readers import ClipReader, read_ahead
from v2l_fast.data.samples import Failure
from v2l_fast.data.shards import Line, Progress, Shards, run_on_ray
from v2l_fast.errors import ConfigError, VideoError
from v2l_fast.files import write_jsonl
from v2l_fast.generation import SamplingParams, generate
from v2l_fast.loading import shipped
from v2l_fast.outputs import check_folder
from v2l_fast.video import Clip
from v2l_fast.vlm import Backbone, VideoChunk, load_backbone

# What must be in a manifest to be taught from: the answers are written here.
REQUIRED = ("id", "video_path", "task_type", "prompt")


@dataclass(frozen=True)
class TeacherSettings:
    """Who answers, and how.

    Attributes:
        base: the frozen VLM: "shapes" (shipped), a folder or a hub id.
        reader: sampling and resolution, as the hypernetwork will see them.
        max_new_tokens: longest answer; one that reaches it is marked as truncated.
        batch: prompts generated together.
        videos_per_shard: work that is lost at most when a worker dies.
        device, dtype: "cuda" or "cpu" and "float32" or "bfloat16"; None: a GPU and bfloat16 where
            there is one.
        threads: that read videos ahead.
    """

    base: str
    reader: ClipReader
    max_new_tokens: int = 128
    batch: int = 16
    videos_per_shard: int = 32
    device: str | None = None
    dtype: str | None = None
    threads: int = 2

    def meaning(self) -> dict[str, Any]:
        """What the answers depend on."""
        around = {"device", "threads", "videos_per_shard", "reader"}
        told = {k: v for k, v in asdict(self).items() if k not in around}
        return told | {k: v for k, v in asdict(self.reader).items() if k != "seconds"}


@dataclass(frozen=True)
class TeachResult:
    """The manifest written, how many answers are in it, and what was left out."""

    manifest: Path
    answers: int
    failures: list[Failure]


class Teacher:
    """The work of a shard: videos by number -> a line for each answer or failure.

    Loads its model when made, so a process makes one and keeps it.
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
            encoded = self.backbone.encode(clip, self.settings.reader.longest_edge)
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
            return self.settings.reader.read(video)[0]
        except VideoError as error:
            return Failure(video.name, str(error))

    def _answer(self, asked: Sequence[tuple[Example, VideoChunk]]) -> Iterator[Line]:
        """One batch, greedy."""
        limit = self.settings.max_new_tokens
        generated = generate(
            self.backbone.decoder,
            [
                self.backbone.video_prompt(video, example.prompt).embeddings
                for example, video in asked
            ],
            self.backbone.stop_ids,
            SamplingParams(max_new_tokens=limit),
        )
        for (example, _), tokens in zip(asked, generated.tokens, strict=True):
            text = self.backbone.decode(tokens)
            if not text:
                reason = f"the teacher answers {example.id!r} with nothing"
                yield {"failure": {"video": example.video_path, "reason": reason}}
                continue
            told = {"teacher": self.settings.base}
            if example.target_text:
                told["reference"] = example.target_text
            if len(tokens) == limit:
                told["truncated"] = True
            kept = {k: v for k, v in example.metadata.items() if k != "truncated"}
            yield {"row": example.row(target_text=text, metadata=kept | told), "path": example.path}


def load_frozen(base: str, device: str | None = None, dtype: str | None = None) -> Backbone:
    """A frozen VLM by its shipped name, folder or hub id, compiled on a GPU.

    Raises:
        CheckpointError: it cannot be loaded.
        ConfigError: a GPU is asked for and there is none.
    """
    cuda = torch.cuda.is_available()
    chosen = torch.device(device or ("cuda" if cuda else "cpu"))
    if chosen.type == "cuda" and not cuda:
        raise ConfigError(f"device {device}: this machine has no usable GPU; see v2l doctor")
    default = torch.bfloat16 if chosen.type == "cuda" else torch.float32
    backbone = load_backbone(
        shipped(base, "base") or base, chosen, default if dtype is None else getattr(torch, dtype)
    )
    if chosen.type == "cuda":
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
    """Answer every prompt of a manifest; goes on where an earlier run of the same stopped.

    Args:
        out: folder of the shards, ``manifest.jsonl`` (paths relative to it) and
            ``quarantine.jsonl``.
        engine: "hf", in this process; "ray", `workers` processes of a Ray cluster.
        progress: called with (videos done, videos in all).

    Raises:
        ManifestError: the manifest cannot be used.
        ShardError: `out` holds another run, or the cluster did not finish it.
        WriteError: `out` holds the manifest, or files that another program wrote.
    """
    # The folder continues an earlier run; what it did not write itself stays.
    names = ("manifest.jsonl", "quarantine.jsonl")
    check_folder(out, names, [manifest], force=(Path(out) / "run.json").is_file())
    examples = load_manifest(manifest, root, required=REQUIRED)
    videos = group_by_video(examples)
    meaning = settings.meaning() | {"manifest": _digest(examples)}
    shards = Shards.open(out, meaning, len(videos), settings.videos_per_shard)
    if engine == "ray":
        gpus = 0 if settings.device == "cpu" else None
        run_on_ray(shards, Teacher, (videos, settings), workers, gpus, progress)
    elif shards.missing():
        shards.run(Teacher(videos, settings), progress)
    return _gather(shards)


def _gather(shards: Shards) -> TeachResult:
    """All shards' answers as one manifest, and the failures."""
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


def _digest(examples: Sequence[Example]) -> str:
    """Hash of everything the answers depend on in a manifest, and of their order."""
    told = [[e.id, e.video_path, e.span, e.prompt] for e in examples]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()
