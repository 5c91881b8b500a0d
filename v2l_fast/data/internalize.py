"""A whole manifest of videos internalized into an adapter store, on one machine or a cluster.

Responsible for going through the videos: reading ahead, shards that resume, failures set aside. How
videos become adapters is the model's, how adapters are kept the store's, how shards are spread over
workers `v2l_fast.data.shards`'s.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from v2l_fast.data.manifest import VideoExamples, group_by_video, load_manifest
from v2l_fast.data.readers import ClipReader, read_ahead
from v2l_fast.data.samples import Failure
from v2l_fast.data.shards import Line, Progress, Shards, run_on_ray
from v2l_fast.errors import ConfigError, VideoError
from v2l_fast.files import write_jsonl
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.model import BATCH_SIZE, Video2LoRA
from v2l_fast.store.adapter_store import AdapterStore
from v2l_fast.video import Clip, FrameSampling
from v2l_fast.video.reading import BACKENDS, Backend


@dataclass(frozen=True)
class CorpusSettings:
    """What internalizes, and how.

    Attributes:
        model, base, device, dtype: as of :meth:`~v2l_fast.model.Video2LoRA.from_pretrained`, the
            dtype by name.
        max_frames, longest_edge: as in training when None.
        exact_frames: take exactly `max_frames`, whatever the duration.
        seconds: longest time one file may take to read.
        videos_per_shard: work that is lost at most when a worker dies.
        threads: that read videos ahead; on a GPU they share its decoder's batches.
        decoder: as `backend` of :func:`~v2l_fast.video.load_video`; "auto" is the GPU where it
            can. Files it leaves to the CPU are counted in ``v2l_fast.video.fallbacks``.
        batch_size: videos that go through the model together.

    Raises:
        ConfigError: an unknown decoder, or ``batch_size`` is less than 1.
    """

    model: str
    base: str | None = None
    device: str | None = None
    dtype: str | None = None
    max_frames: int | None = None
    longest_edge: int | None = None
    exact_frames: bool = False
    seconds: float = 60.0
    videos_per_shard: int = 64
    threads: int = 4
    decoder: Backend = "auto"
    batch_size: int = BATCH_SIZE

    def __post_init__(self) -> None:
        # Each video would fail for it, and be left out.
        if self.decoder not in BACKENDS:
            raise ConfigError(f"decoder must be one of {', '.join(BACKENDS)}, got {self.decoder!r}")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}")
        # What the model was trained with does not matter here: only that the values are in range.
        FrameSampling(1, 2).override(self.max_frames, self.longest_edge)

    def meaning(self) -> dict[str, Any]:
        """What the adapters depend on."""
        around = {"device", "seconds", "videos_per_shard", "threads", "decoder", "batch_size"}
        return {k: v for k, v in asdict(self).items() if k not in around}


@dataclass(frozen=True)
class Corpus:
    """What came of it: the list of adapters (JSONL), how many, and the videos left out."""

    listing: Path
    adapters: int
    failures: list[Failure]


class Internalizer:
    """The work of a shard: videos by number -> a line for each adapter or failure."""

    def __init__(
        self, videos: Sequence[VideoExamples], store: str | os.PathLike, settings: CorpusSettings
    ) -> None:
        self.videos = videos
        self.settings = settings
        dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
        self.model = Video2LoRA.from_pretrained(
            settings.model, settings.base, settings.device, dtype
        )
        self.reader = ClipReader.of(
            self.model.config.sampling.override(
                settings.max_frames, settings.longest_edge, exact_frames=settings.exact_frames
            ),
            settings.seconds,
            settings.decoder,
            str(self.model.backbone.decoder.device),
        )
        self.store = AdapterStore(store)

    def __call__(self, numbers: Sequence[int]) -> list[Line]:
        videos = [self.videos[number] for number in numbers]
        threads, batch_size = self.settings.threads, self.settings.batch_size
        # While one batch is computed, the next is read.
        clips = read_ahead(self._read, videos, threads, max(2 * threads, batch_size))
        adapters = self.model.internalize_each(
            clips,
            longest_edge=self.reader.longest_edge,
            exact_frames=self.reader.exact_frames,
            batch_size=batch_size,
        )
        return [self._line(*pair) for pair in zip(videos, adapters, strict=True)]

    def close(self) -> None:
        self.store.close()

    def _read(self, video: VideoExamples) -> Clip | VideoError:
        try:
            return self.reader.read(video)[0]
        except VideoError as error:
            return error

    def _line(self, video: VideoExamples, adapter: Adapter | VideoError) -> Line:
        if isinstance(adapter, VideoError):
            return {"failure": asdict(Failure(video.name, str(adapter)))}
        if video.span is not None:
            # Whoever asks for the whole file must not be given a part of it.
            told = {**adapter.provenance["preprocessing"], "span": list(video.span)}
            record = {**adapter.provenance, "preprocessing": told}
            adapter = replace(adapter, provenance=record)
        return {
            "video_path": video.examples[0].video_path,
            "span": video.span,
            "ids": [example.id for example in video.examples],
            "adapter": self.store.put(adapter),
        }


def internalize_corpus(
    manifest: str | os.PathLike,
    store: str | os.PathLike,
    settings: CorpusSettings,
    root: str | os.PathLike | None = None,
    engine: str = "local",
    workers: int = 1,
    progress: Progress = lambda done, total: None,
) -> Corpus:
    """Internalize every video (and span) of a manifest once; goes on where an earlier run stopped.

    Args:
        manifest: only ``video_path`` is needed in a line; ``metadata.span`` is honored.
        store: folder of an :class:`~v2l_fast.store.adapter_store.AdapterStore`, which
            servers may use at the same time. The run's own files go under ``corpora/`` there, with
            ``adapters.jsonl``: video path, span, example ids and adapter id.
        engine: "local", in this process; "ray", `workers` processes of a Ray cluster.
        progress: called with (videos done, videos in all).

    Raises:
        ManifestError: the manifest cannot be used.
        ShardError, StoreError: a folder cannot be written, or the cluster did not finish.
        CheckpointError, ConfigError: the model cannot be loaded.
    """
    videos = group_by_video(load_manifest(manifest, root, required=("video_path",)))
    told = [[v.examples[0].video_path, v.span, [e.id for e in v.examples]] for v in videos]
    meaning = {**settings.meaning(), "videos": told}
    digest = hashlib.sha256(json.dumps(meaning).encode()).hexdigest()
    store = Path(store).resolve()
    folder = store / "corpora" / f"{Path(manifest).stem}-{digest[:12]}"
    shards = Shards.open(
        folder, settings.meaning() | {"digest": digest}, len(videos), settings.videos_per_shard
    )
    if engine == "ray":
        gpus = 0 if settings.device == "cpu" else None
        run_on_ray(shards, Internalizer, (videos, store, settings), workers, gpus, progress)
    elif shards.missing():
        with closing(Internalizer(videos, store, settings)) as work:
            shards.run(work, progress)
    lines = list(shards.lines())
    failures = [Failure(**line["failure"]) for line in lines if "failure" in line]
    made = [line for line in lines if "failure" not in line]
    write_jsonl(folder / "adapters.jsonl", made)
    return Corpus(folder / "adapters.jsonl", len(made), failures)
